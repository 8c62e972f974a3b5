"""DeepSeek's mixture of experts: many small experts, some shared by all tokens (arXiv 2401.06066), in balance without a
loss (arXiv 2408.15664), as in DeepSeek-V3 (arXiv 2412.19437).

    s = sigmoid(W_r x) (E,),     C = the k largest of s + b,     g = s / sum_{j in C} s_j
    y = SwiGLU_shared(x) + sum_{i in C} g_i SwiGLU_i(x)
    after every optimizer step:  b_i += rate * sign(mean(c) - c_i)      c_i tokens that chose i since the last one

Time O(T D (S + k) F), for S shared and k chosen experts of width F; no state. Training alone gathers c, over
micro-batches and processes. The traps: b only chooses. In the weights g, the network would learn to depend on a number
that no gradient moves. It is a buffer, which a checkpoint holds. Each token chooses alone: the balance comes from
earlier steps, so nothing leaks within a batch. Gradient checkpointing counts every token twice, which the sign makes
harmless.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, hidden_width
from llmx.parts.experts import Router, SwiGLUExperts, check_routing, load_of
from llmx.parts.init import normal_, residual_std
from llmx.protocol import Context, Hidden, Site, Stateless


class DeepSeekMoE(Stateless):
    """(B, T, D) -> (B, T, D).

    Args:
        experts: E, the experts to choose from.
        top_k: chosen experts a token; at least 2, up to `experts`.
        shared: experts that every token uses; at least 1.
        hidden: width inside an expert; if not given 8/3 dim / (top_k + shared), rounded, a SwiGLU's parameters a token.
        bias_rate: by how much a bias moves after an optimizer step.
    """

    bias: Tensor  # (E,)
    load: Tensor  # (E,) int64, tokens that chose each expert since the last optimizer step

    def __init__(
        self,
        site: Site,
        experts: int = 16,
        top_k: int = 3,
        shared: int = 1,
        hidden: int | None = None,
        bias_rate: float = 0.001,
    ):
        super().__init__()
        check_routing(experts, top_k)
        check_sizes(shared=shared)
        hidden = hidden_width(hidden, 8 * site.dim / 3 / (top_k + shared))
        self.top_k = top_k
        self.bias_rate = bias_rate
        self.router = Router(site.dim, experts)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.experts = SwiGLUExperts(site.dim, hidden, experts, site.depth)
        self.shared_gate_up = nn.Linear(site.dim, 2 * shared * hidden, bias=False)
        self.shared_down = nn.Linear(shared * hidden, site.dim, bias=False)
        normal_(self.shared_gate_up)
        normal_(self.shared_down, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        tokens = x.flatten(0, 1)  # (N, D)
        scores = self.router(tokens).sigmoid()  # (N, E)
        chosen = (scores + self.bias).topk(self.top_k, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.load.add_(load_of(chosen, scores.shape[1]))  # in place, for a compiler under gradient checkpointing
        gate, up = self.shared_gate_up(tokens).chunk(2, -1)
        return (self.shared_down(F.silu(gate) * up) + self.experts(tokens, chosen, weights)).view(x.shape)

    def after_optimizer_step(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.load)
        # the sign of E (mean(c) - c_i), in integers
        self.bias += self.bias_rate * (self.load.sum() - len(self.load) * self.load).sign()
        self.load.zero_()
