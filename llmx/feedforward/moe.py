"""A mixture of experts in which each token chooses alone, as in Mixtral (arXiv 2401.04088).

    l = W_r x (E,),     C = the k largest of l,     y = sum_{i in C} softmax_C(l)_i SwiGLU_i(x)
    balance loss = E sum_i f_i p_i      f_i the share of choices that fell on i, p_i the mean of softmax(l)_i

The loss is the Switch Transformer's (arXiv 2101.03961), with f_i that sum to 1 for every k. It is 1 where experts are
in balance, counts in nats per token times `balance`, and adds up over layers. Without it a few experts take all tokens.
Time O(T D k F); no state. A matrix has E F D parameters, of which a token uses k F D. There is no capacity limit, so no
token is dropped. The traps: a limit, or any choice that compares tokens, lets later tokens and other rows of the batch
decide on earlier tokens. The softmax goes over the chosen k alone. k = 1 would make every weight 1 and leave the router
without a gradient. The balance loss belongs to training, not to the validation loss.
"""

from llmx.parts.checks import hidden_width
from llmx.parts.experts import Router, SwiGLUExperts, check_routing, load_of
from llmx.protocol import Context, Hidden, Site, Stateless


class MixtureOfExperts(Stateless):
    """(B, T, D) -> (B, T, D).

    Args:
        experts: E.
        top_k: experts a token; at least 2, up to `experts`.
        hidden: width inside an expert; if not given 8/3 dim / top_k, rounded, a SwiGLU's parameters a token.
        balance: coefficient of the balance loss, from 0 up.
    """

    def __init__(self, site: Site, experts: int = 8, top_k: int = 2, hidden: int | None = None, balance: float = 0.01):
        super().__init__()
        check_routing(experts, top_k)
        hidden = hidden_width(hidden, 8 * site.dim / 3 / top_k)
        if balance < 0:
            raise ValueError(f"balance: {balance} is below 0")
        self.top_k = top_k
        self.balance = balance
        self.router = Router(site.dim, experts)
        self.experts = SwiGLUExperts(site.dim, hidden, experts, site.depth)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        tokens = x.flatten(0, 1)  # (N, D)
        logits = self.router(tokens)  # (N, E)
        largest, chosen = logits.topk(self.top_k, -1)
        if self.training:
            experts = logits.shape[1]
            share = load_of(chosen, experts) / chosen.numel()
            context.add_loss(self.balance * experts * (share * logits.softmax(-1).mean(0)).sum())
        return self.experts(tokens, chosen, largest.softmax(-1)).view(x.shape)
