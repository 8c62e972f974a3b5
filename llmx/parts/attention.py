"""Softmax attention over the past, shared by the attention mixers.

On a CPU the products are written out: the fused kernel's bf16 backward pays per-call overhead for every tiny matrix
product, and at a window of 32 that costs more than the whole step's arithmetic. Elsewhere PyTorch's fused kernel runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(query key^T / sqrt(K) + causal mask) value, with grouped heads.

    query (B, H, T, K), key (B, G, T, K), value (B, G, T, V) -> (B, H, T, V). Query head h reads group h // (H / G).
    `dropout` is the probability for attention weights; the caller passes 0 outside of training.
    """
    if query.device.type != "cpu":
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
    time = query.shape[2]
    future = torch.ones(time, time, dtype=torch.bool, device=query.device).triu(1)
    return masked_attention(query, key, value, future, dropout)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, dropout: float = 0.0) -> Tensor:
    """The same over S slots, written out, with the slots that are `hidden` from each position left out.

    query (B, H, T, K), key (B, G, S, K), value (B, G, S, V), hidden (T, S) or (B, 1, 1, T, S) -> (B, H, T, V).
    """
    batch, heads, time, head_dim = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups * time, head_dim) * head_dim**-0.5
    scores = (query @ key.transpose(-1, -2)).view(batch, groups, heads // groups, time, key.shape[2])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    mixed = weights.view(batch, groups, heads // groups * time, key.shape[2]) @ value
    return mixed.view(batch, heads, time, value.shape[-1])
