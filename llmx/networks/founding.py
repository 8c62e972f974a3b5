"""Reproduction of the experiment that started this project, with its leak: use nothing of this file in new work.

A Llama-like Transformer on Tiny Shakespeare was published with a validation loss of 1.02, and a Differential
Transformer by the same author with 1.18. Both numbers are artefacts of their norm:

    y = x / sqrt(mean over TIME and dim of x^2) * weight,     weight (window, dim)

It scales every position by a statistic of the whole window, which includes the characters to predict. The rest is also
as it was: one norm a layer, used twice; the residual added to the normalised stream; a feed-forward W2 (silu(h) * W h)
with h = W1 x; interleaved rotary pairs; no last norm; PyTorch's own initialisation.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.attention import causal_attention
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype
from llmx.protocol import Block, Context, Hidden, Mixer, Network, NewFeedForward, NewMixer, Pointwise, Site, Tokens


class FoundingNorm(nn.Module):
    """The leak: a root mean square over time and dim, and a gain for each position."""

    def __init__(self, window: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(window, dim))

    def forward(self, x: Hidden) -> Hidden:
        scale = x.square().mean((1, 2), keepdim=True).rsqrt()  # (B, 1, 1)
        return x * scale * self.weight[: x.shape[1]]


class FoundingAttention(Mixer):
    """Causal attention with interleaved rotary pairs, no biases."""

    def __init__(self, site: Site, heads: int = 8, rotary_base: float = 10000.0):
        super().__init__()
        self.heads = heads
        self.rotary_base = rotary_base
        self.query, self.key, self.value, self.out = (nn.Linear(site.dim, site.dim, bias=False) for _ in range(4))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )  # (B, H, T, K)
        query, key = (_rotate_interleaved(x, context, self.rotary_base, x.shape[-1]) for x in (query, key))
        return self.out(causal_attention(query, key, value).transpose(1, 2).flatten(2))


class FoundingDifferentialAttention(Mixer):
    """The difference of two causal attentions (arXiv 2410.05258), as the experiment wrote it.

    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init, with vectors as wide as a value head. The rotary angles are
    for a head of that width too, and the half-width queries and keys use the first half of them.
    """

    def __init__(self, site: Site, heads: int = 4, rotary_base: float = 10000.0):
        super().__init__()
        self.heads = heads
        self.rotary_base = rotary_base
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * site.layer)
        self.query, self.key, self.value, self.out = (nn.Linear(site.dim, site.dim, bias=False) for _ in range(4))
        width = site.dim // heads
        self.lambdas = nn.ParameterList(nn.Parameter(0.1 * torch.randn(width)) for _ in range(4))  # lq1 lk1 lq2 lk2
        self.norm = RMSNorm(width, eps=1e-5)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key = (
            linear(x).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key)
        )  # (B, 2 H, T, K / 2)
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, K)
        query, key = (_rotate_interleaved(x, context, self.rotary_base, value.shape[-1]) for x in (query, key))
        attended = causal_attention(query, key, value.repeat_interleave(2, 1))  # (B, 2 H, T, K)
        query1, key1, query2, key2 = self.lambdas
        scale = (query1 @ key1).exp() - (query2 @ key2).exp() + self.lambda_init
        difference = attended[:, 0::2] - scale * attended[:, 1::2]
        normed = self.norm(difference) * (1 - self.lambda_init)
        return self.out(normed.transpose(1, 2).flatten(2))


class FoundingFeedForward(Pointwise):
    """W2 (silu(h) * W h), h = W1 x, all with bias."""

    def __init__(self, site: Site, hidden: int = 341):
        super().__init__()
        self.linear1 = nn.Linear(site.dim, hidden)
        self.linear = nn.Linear(hidden, hidden)
        self.linear2 = nn.Linear(hidden, site.dim)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        h = self.linear1(x)
        return self.linear2(F.silu(h) * self.linear(h))


class FoundingBlock(Block):
    """x = norm(x); x = x + mixer(x); x = norm(x); x = x + feed_forward(x), with the same norm twice."""

    def __init__(self, site: Site, window: int, mixer: NewMixer, feed_forward: NewFeedForward):
        super().__init__()
        self.norm = FoundingNorm(window, site.dim)
        self.mixer = site.place(mixer)
        self.feed_forward = site.place(feed_forward)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        x = self.norm(x)
        x = x + self.mixer(x, context)
        x = self.norm(x)
        return x + self.feed_forward(x, context)


class FoundingNetwork(Network):
    """Embedding, blocks, head with bias. More than `window` tokens are an error: the norm has a weight for each."""

    def __init__(
        self,
        vocab_size: int,
        mixer: NewMixer = FoundingAttention,
        feed_forward: NewFeedForward = FoundingFeedForward,
        dim: int = 128,
        depth: int = 4,
        window: int = 32,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.window = window
        self.embedding = nn.Embedding(vocab_size, dim)
        sites = (Site(dim=dim, layer=layer, depth=depth) for layer in range(depth))
        self.blocks = nn.ModuleList(FoundingBlock(site, window, mixer, feed_forward) for site in sites)
        self.head = nn.Linear(dim, vocab_size)

    @property
    def layers(self) -> Sequence[Block]:
        return cast(Sequence[Block], self.blocks)

    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        if tokens.shape[1] > self.window:
            raise ValueError(f"window: {tokens.shape[1]} tokens for a network built for windows of {self.window}")
        x = self.embedding(tokens)
        context = Context(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], x)
        for block in self.blocks:
            x = block(x, context)
        return x, context

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


def _rotate_interleaved(x: Tensor, context: Context, base: float, table_width: int) -> Tensor:
    """Turns the pairs (2 i, 2 i + 1) of x (B, H, T, K) by position * base^(-2 i / table_width)."""
    exact = exact_dtype(x)
    exponents = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=exact) / table_width
    angles = context.positions[:, None, :, None] * base**-exponents  # (1, 1, T, K / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
