"""States that several mixers share. A mixer with another state defines it beside itself."""

from typing import NamedTuple

from torch import Tensor


class HiddenState(NamedTuple):
    hidden: Tensor  # (B, F), h


class MemoryState(NamedTuple):
    memory: Tensor  # (B, H, K, V), S


class ConvolvedState(NamedTuple):
    convolution: Tensor  # (B, w - 1, ...), the last inputs of the short convolution
    memory: Tensor  # (B, H, K, V), S; in Mamba (B, F, N), h
