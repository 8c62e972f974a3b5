"""Experts that choose their tokens (arXiv 2202.09368): perfect balance, at the price of looking into the future.

    s = softmax(W_r x) over experts (T, E),     C_i = the c T / E tokens with the largest s_{., i},   c the capacity
    y_t = sum_{i: t in C_i} s_{t, i} SwiGLU_i(x_t)

A token gets c experts on average, and some get none. Time O(T D c F); no state, for there is no recurrent form. The
trap is the design: a token competes with all the others of its sequence, so whether position t gets an expert depends
on tokens after t. No gradient shows it, as the choice has none. A language model trained with it scores itself with
knowledge that generation will not have. It is here to be measured: the audit finds it and marks its runs as leaking.
Experts choose within each sequence, so that no other row of the batch leaks as well.
"""

import torch

from llmx.parts.checks import hidden_width
from llmx.parts.experts import Router, SwiGLUExperts
from llmx.protocol import Context, FeedForward, Hidden, Site


class ExpertChoice(FeedForward):
    """(B, T, D) -> (B, T, D); the output at t depends on all of the sequence.

    Args:
        experts: E.
        capacity: experts a token gets on average; above 0, up to `experts`.
        hidden: width inside an expert; if not given 8/3 dim / capacity, rounded, a SwiGLU's parameters a mean token.
    """

    def __init__(self, site: Site, experts: int = 8, capacity: float = 2.0, hidden: int | None = None):
        super().__init__()
        if not 0 < capacity <= experts:
            raise ValueError(f"capacity: {capacity} is not above 0 and up to the number of experts, {experts}")
        hidden = hidden_width(hidden, 8 * site.dim / 3 / capacity)
        self.capacity = capacity
        self.router = Router(site.dim, experts)
        self.experts = SwiGLUExperts(site.dim, hidden, experts, site.depth)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        batch, time, _ = x.shape
        scores = self.router(x).softmax(-1)  # (B, T, E)
        experts = scores.shape[2]
        tokens = max(1, int(time * self.capacity / experts))
        weights, chosen = scores.permute(2, 0, 1).topk(tokens, -1)  # (E, B, c T / E)
        places = (chosen + torch.arange(0, batch * time, time, device=x.device)[:, None]).flatten()
        counts = torch.full((experts,), batch * tokens, device=x.device)
        outputs = self.experts.run(x.flatten(0, 1).index_select(0, places), counts)
        weighted = outputs * weights.flatten()[:, None]
        summed = weighted.new_zeros(batch * time, x.shape[2]).index_add(0, places, weighted)
        return summed.view(x.shape).to(outputs.dtype)
