"""Softmax attention over the past, shared by the attention mixers.

PyTorch's fused kernel runs, except for 16-bit numbers over short windows on a CPU. There its backward pays per-call
overhead for every tiny matrix product: at a window of 32 more than the arithmetic of the whole step. So the products
are written out. In fp32 the fused kernel is faster at every window (AVX2, forward and backward: 1.4 times at 32, 6
times at 2,048).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmx.protocol import Context

WRITTEN_OUT_UP_TO = 256  # positions; memory is quadratic in them


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(query key^T / sqrt(K) + causal mask) value, with grouped heads.

    query (B, H, T, K), key (B, G, T, K), value (B, G, T, V) -> (B, H, T, V). Query head h reads group h // (H / G).
    `dropout` is the probability of dropping an attention weight; callers pass 0 outside of training.
    """
    time = query.shape[2]
    # the value's dtype decides, because under autocast the rotation makes query and key fp32 again
    if query.device.type != "cpu" or value.element_size() > 2 or time > WRITTEN_OUT_UP_TO:
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
    bias = torch.full((time, time), float("-inf"), dtype=value.dtype, device=query.device).triu(1)
    # as_strided makes Inductor keep the bias as a table, instead of comparing positions for every score
    return masked_attention(query, key, value, bias.as_strided((time, time), (time, 1)), dropout)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    dropout: float = 0.0,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T / sqrt(K) + bias) value over S slots, written out.

    query (B, H, T, K), key (B, G, S, K), value (B, G, S, V), bias that broadcasts to (B, G, H/G, T, S)
    -> (B, H, T, V). The bias is -inf for slots that a position must not see. `cap` bounds the scores by
    cap tanh(score / cap) before the bias. `sink` (H,) is one more score in every softmax, whose value is zero.
    """
    batch, heads, time, head_dim = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups * time, head_dim) * head_dim**-0.5
    scores = (query @ key.transpose(-1, -2)).view(batch, groups, heads // groups, time, key.shape[2])
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    # autocast would make the weights fp32, and keep them for the backward pass beside a 16-bit copy
    with torch.autocast(query.device.type, enabled=False):
        scores = scores + bias.to(scores.dtype)
        if sink is None:
            weights = scores.softmax(-1)
        else:
            extra = sink.to(scores.dtype).view(groups, heads // groups, 1, 1).expand(batch, -1, -1, time, 1)
            weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    if dropout:
        weights = F.dropout(weights, dropout)
    mixed = weights.reshape(batch, groups, heads // groups * time, key.shape[2]) @ value
    return mixed.view(batch, heads, time, value.shape[-1])


def past_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, cap: float | None = None, sink: Tensor | None = None
) -> Tensor:
    """`masked_attention` for a prefill or a step.

    PyTorch's fused kernel runs if there are several positions and only a bias changes the scores. In fp32 a prompt of
    128 takes 0.9 of the time, 64 such prompts take 0.6. For one position the kernel is no faster, and slower for 64
    rows. Written out, it also compiles into one function with the rest of a step.
    """
    batch, heads, time, _ = query.shape
    groups, slots = key.shape[1:3]
    if time == 1 or cap is not None or sink is not None:
        return masked_attention(query, key, value, bias, cap=cap, sink=sink)
    bias = bias.expand(batch, groups, heads // groups, time, slots).flatten(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=groups != heads)


def write(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """Puts new (B, T, G, K) into the cache (B, G, S, K) at slots (B, T); in place while gradients are off."""
    if torch.is_grad_enabled():
        cache = cache.clone()
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    # not scatter_, because Inductor runs that on a copy of the cache
    cache[rows, :, slots] = new.to(cache.dtype)
    return cache


def query_positions(context: Context) -> Tensor:
    """The positions of a prefill or a step, (B, T); T is 1 in a step."""
    return context.positions if context.positions.dim() == 2 else context.positions[:, None]


def past_bias(context: Context, slots: int, dtype: torch.dtype) -> Tensor:
    """The bias that hides the slots after a position, (B, 1, 1, T, S). Slot s holds position s.

    The context keeps it, so all layers of a prefill or a step share one.
    """
    name = f"past {slots} {dtype}"
    if name not in context.store:
        hidden = torch.arange(slots, device=context.positions.device) > context.positions[..., None]
        context.store[name] = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))
    bias = context.store[name]  # (B, T, S), or (B, S)
    return bias.view(len(bias), 1, 1, -1, slots)


class KeyValues(NamedTuple):
    """The keys and values of the past, slot s for position s. A step writes them in place while gradients are off."""

    key: Tensor  # (B, G, S, K)
    value: Tensor  # (B, G, S, V)


def empty_cache(like: Tensor, batch_size: int, groups: int, slots: int, width: int) -> KeyValues:
    """Zeros of the dtype and device of `like`, with keys and values of one width."""
    shape = (batch_size, groups, slots, width)
    return KeyValues(like.new_zeros(shape), like.new_zeros(shape))


def attend_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KeyValues,
    context: Context,
    bias: Tensor | None = None,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, KeyValues]:
    """Writes the T tokens of a prefill, or the one token of a step, into the cache and attends over it.

    query (B, T, H, K), key (B, T, G, K), value (B, T, G, V), bias on the scores that broadcasts to (B, G, H/G, T, S)
    -> (B, T, H V) and the cache.
    """
    positions = query_positions(context)
    cache = KeyValues(write(cache.key, key, positions), write(cache.value, value, positions))
    hidden = past_bias(context, cache.key.shape[2], query.dtype)
    bias = hidden if bias is None else hidden + bias
    keys, values = cache.key.to(query.dtype), cache.value.to(query.dtype)
    mixed = past_attention(query.transpose(1, 2), keys, values, bias, cap, sink)
    return mixed.transpose(1, 2).flatten(2), cache


def biased_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """`masked_attention` among T tokens, each of which sees itself and the tokens before it.

    query (B, H, T, K), key (B, G, T, K), value (B, G, T, V), bias that broadcasts to (B, G, H/G, T, T) -> (B, H, T, V).
    """
    time = query.shape[2]
    hidden = torch.full((time, time), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    return masked_attention(query, key, value, hidden if bias is None else bias + hidden, dropout, cap, sink)
