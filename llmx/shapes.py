"""The glossary of dimensions, and names for the tensors that carry them.

    B  batch                     sequences in a batch
    T  time                      positions of a sequence
    S  slots                     positions that a preallocated state has room for
    D  dim                       width of the residual stream
    H  heads                     query heads
    G  kv_heads                  key/value heads (G divides H)
    K  head_dim                  width of one head's query and key
    V  vocabulary                distinct tokens (in a mixer: width of one head's value)
    F  hidden                    width inside a feed-forward

The aliases document a signature; they are not checked.
"""

from torch import Tensor

Tokens = Tensor  # (B, T) int64
Hidden = Tensor  # (B, T, D)
Logits = Tensor  # (B, T, V)
Losses = Tensor  # (B, T) float32, nats
