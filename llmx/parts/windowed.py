"""Attention over the last w positions, the query's own included, in time linear in the length.

The parallel form cuts the sequence into pieces of w; a query sees its own piece and the one before. The state is a ring
of w slots, whatever the length: slot p mod w holds position p.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmx.parts.attention import KeyValues, masked_attention, past_attention, query_positions, write
from llmx.protocol import Context


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    dropout: float = 0.0,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """query (B, H, T, K), key (B, G, T, K), value (B, G, T, V) -> (B, H, T, V)."""
    batch, _, time, _ = query.shape
    window = min(window, time)
    pieces = -(-time // window)

    def cut(x: Tensor) -> Tensor:
        """(B, H, T, K) -> (B, N, H, w, K), the last piece padded with zeros."""
        return F.pad(x, (0, 0, 0, pieces * window - time)).unflatten(2, (pieces, window)).transpose(1, 2)

    def with_last(x: Tensor) -> Tensor:
        """(B, G, T, K) -> (B N, G, 2 w, K): each piece behind the one before it."""
        own = cut(x)
        return torch.cat((F.pad(own, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], own), 3).flatten(0, 1)

    slots = torch.arange(2 * window, device=query.device)
    lag = torch.arange(window, device=query.device)[:, None] + window - slots  # (w, 2 w)
    visible = (lag >= 0) & (lag < window)
    first = visible & (slots >= window)  # there is no piece before the first
    seen = torch.stack([first, *[visible] * (pieces - 1)])  # (N, w, 2 w)
    bias = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, float("-inf"))
    bias = bias.repeat(batch, 1, 1)[:, None, None]  # (B N, 1, 1, w, 2 w)
    mixed = masked_attention(cut(query).flatten(0, 1), with_last(key), with_last(value), bias, dropout, cap, sink)
    return mixed.unflatten(0, (batch, pieces)).transpose(1, 2).flatten(2, 3)[:, :, :time]


def attend_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: KeyValues,
    context: Context,
    window: int,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, KeyValues]:
    """Attention of the T tokens of a prefill, or of the one token of a step, over the ring and themselves.

    query (B, T, H, K), key (B, T, G, K), value (B, T, G, V), ring of at most w slots -> (B, T, H V) and the ring.
    """
    positions = query_positions(context)
    size = ring.key.shape[2]
    slots = positions[:, -size:] % size
    alone = positions.shape[1] == 1  # a single token sees nothing but the ring with itself in it
    newest = positions[:, :1] if alone else positions[:, :1] - 1  # in the ring that attention reads
    held = newest - (newest - torch.arange(size, device=query.device)) % size  # (B, S), negative in an empty slot
    if not alone:  # copy before writing the ring
        keys = torch.cat((ring.key.to(key.dtype), key.transpose(1, 2)), 2)
        values = torch.cat((ring.value.to(value.dtype), value.transpose(1, 2)), 2)
        held = torch.cat((held, positions), 1)
    ring = KeyValues(write(ring.key, key[:, -size:], slots), write(ring.value, value[:, -size:], slots))
    if alone:
        keys, values = ring.key.to(key.dtype), ring.value.to(value.dtype)
    lag = positions[:, :, None] - held[:, None]  # (B, T, S), or (B, T, S + T)
    hidden = (lag < 0) | (lag >= window) | (held[:, None] < 0)
    bias = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, float("-inf"))[:, None, None]
    mixed = past_attention(query.transpose(1, 2), keys, values, bias, cap, sink)
    return mixed.transpose(1, 2).flatten(2), ring
