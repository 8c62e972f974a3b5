"""Heads: they map the last hidden vector to logits."""

import torch
from torch import Tensor, nn

from llmx.parts.checks import check_positive
from llmx.parts.init import normal_
from llmx.parts.norm import LearnedScale, renormalise_
from llmx.protocol import Head


class LinearHead(Head):
    """One matrix, with or without a bias, from a normal distribution of standard deviation `std`."""

    def __init__(self, dim: int, vocab_size: int, bias: bool = False, std: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(dim, vocab_size, bias=bias)
        normal_(self.linear, std)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


class SoftCappedHead(Head):
    """cap tanh(W h / cap): no logit leaves (-cap, cap) (Gemma 2, arXiv 2408.00118). The cap is positive."""

    def __init__(self, dim: int, vocab_size: int, cap: float = 30.0):
        super().__init__()
        check_positive(cap=cap)
        self.cap = cap
        self.linear = nn.Linear(dim, vocab_size, bias=False)
        normal_(self.linear)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.cap * torch.tanh(self.linear(hidden) / self.cap)


class UnitHead(Head):
    """s_z * (W h), where rows of W get length 1 again after every optimizer step (nGPT, arXiv 2410.01131).

    As h has length 1 too, a row's product is a cosine. s_z (V,) sets how sharp the distribution can be. It starts at 1
    and is stored as 1 / sqrt(D).
    """

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.linear = nn.Linear(dim, vocab_size, bias=False)
        self.scale = LearnedScale(vocab_size, 1.0, dim**-0.5)
        normal_(self.linear)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        renormalise_(self.linear.weight, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) * self.scale()
