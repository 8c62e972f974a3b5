"""Token embeddings, with and without positions."""

import math

import torch
from torch import Tensor, nn

from llmx.parts.checks import check_sizes
from llmx.parts.init import normal_
from llmx.parts.norm import renormalise_
from llmx.parts.rotary import rotary_table
from llmx.protocol import Embedding


class TokenEmbedding(Embedding):
    """A vector for each token, without its position.

    Args:
        scale: factor on the vectors; the square root of `dim` in Gemma.
        std: standard deviation of the initialisation.
    """

    def __init__(self, vocab_size: int, dim: int, scale: float = 1.0, std: float = 0.02):
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim)
        self.scale = scale
        normal_(self.table, std)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        vectors = self.table(tokens)
        return vectors if self.scale == 1 else vectors * self.scale


class LearnedPositionEmbedding(Embedding):
    """The sum of a vector for the token and a learned vector for its position (GPT-2).

    Args:
        max_length: positions that have a vector; `forward` raises ValueError for more tokens.
    """

    def __init__(self, vocab_size: int, dim: int, max_length: int = 32):
        super().__init__()
        check_sizes(max_length=max_length)
        self.table = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        normal_(self.table)
        normal_(self.positions, 0.01)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        most = self.positions.num_embeddings
        if positions.ndim == 2 and positions.shape[1] > most:
            raise ValueError(f"max_length: {positions.shape[1]} tokens for {most} learned positions")
        return self.table(tokens) + self.positions(positions)


class SinusoidalPositionEmbedding(Embedding):
    """sqrt(dim) times the token's vector, plus sines and cosines of its position (arXiv 1706.03762).

    p[2 i] = sin(t / 10000^(2 i / dim)), p[2 i + 1] = cos of the same angle. The vectors start with standard deviation
    dim^-0.5, so that both terms start at equal size. An odd `dim` is an error.
    """

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim: sines and cosines need an even width, not {dim}")
        self.table = nn.Embedding(vocab_size, dim)
        self.scale = math.sqrt(dim)
        normal_(self.table, dim**-0.5)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        vectors = self.table(tokens)
        cos, sin = rotary_table(positions, vectors.shape[-1], 10000.0, vectors.dtype).unbind(-2)  # (..., D/2)
        return vectors * self.scale + torch.stack((sin, cos), -1).flatten(-2)


class UnitEmbedding(Embedding):
    """A vector for each token, with length 1 again after every optimizer step (nGPT, arXiv 2410.01131)."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim)
        normal_(self.table)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        renormalise_(self.table.weight, 1)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.table(tokens)
