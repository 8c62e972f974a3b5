"""Mini-batches of a text, for memories that learn from b tokens at a time.

The token at position p is place p mod b of mini-batch p div b, wherever a piece of the text begins: a piece may start
and end inside a mini-batch, each row at a place of its own. Cutting is a copy, O(T). The trap: mini-batches counted
from the start of a piece make the outputs depend on how the text was cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class MiniBatches:
    """The places of T = `time` consecutive tokens in mini-batches of b = `size`, on the device of `like`, in its dtype.

    positions (B, T) count from the text's start; without them the tokens are the text's first.

    present: (B, N, 1, b), or with B = 1 where all rows agree: 1 where a token stands, 0 elsewhere
    begins:  (B, N), or with B = 1: whether one of the tokens takes the first place of a mini-batch
    """

    def __init__(self, time: int, size: int, positions: Tensor | None, like: Tensor):
        self.time = time
        self.size = size
        self.first = None if positions is None else positions[:, 0] % size  # (B,), the place of the first token
        self.count = -(-(time if positions is None else time + size - 1) // size)  # the most there can be
        ones = torch.ones(1 if positions is None else len(positions), time, 1, dtype=like.dtype, device=like.device)
        self.present = self.cut(ones)
        self.begins = self.present[:, :, 0, 0] > 0

    def cut(self, x: Tensor) -> Tensor:
        """(B, T, H, ...) -> (B, N, H, b, ...), with zeros where no token stands."""
        room = self.count * self.size
        if self.first is None:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, room - self.time))
        else:
            token = torch.arange(room, device=x.device) - self.first[:, None]  # (B, N b)
            token = torch.where((token < 0) | (token >= self.time), self.time, token)
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))[torch.arange(len(x), device=x.device)[:, None], token]
        return x.unflatten(1, (self.count, self.size)).transpose(2, 3)

    def join(self, x: Tensor) -> Tensor:
        """(B, N, H, b, V) -> (B, T, H, V)"""
        x = x.transpose(2, 3).flatten(1, 2)
        if self.first is None:
            return x[:, : self.time]
        token = self.first[:, None] + torch.arange(self.time, device=x.device)
        return x[torch.arange(len(x), device=x.device)[:, None], token]
