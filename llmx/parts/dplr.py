"""A memory whose transition is diagonal plus rank one, in chunks: RWKV-7, and delta rules with a decay a channel.

    S_t = diag(a_t) S_{t-1} + b_t (S_{t-1}^T r_t)^T + k_t v_t^T          (K, V) a head, a_t = exp(log_decay_t)
    o_t = S_t^T q_t

Inside a chunk of c tokens, with G the sums of log a and u_t = S_{t-1}^T r_t the value erased from the memory,

    u_t = sum_{s < t} (r_t . exp(G_{t-1} - G_s) (b_s u_s^T + k_s v_s^T)) + (exp(G_{t-1}) r_t)^T S_0

is a triangular system with ones on its diagonal, whose inverse is applied to the known part and to the part in S_0.
From chunk to chunk S -> M S + C. Time O(T (c + K) (K + V)) a head in T / c dependent steps, memory O(T (c + K)) and
K (K + V) numbers for each chunk. The traps: u_t reads S_{t-1} before it has faded by a_t, the query after. exp(-G_s)
alone overflows. exp(G_t - m) and exp(m - G_s) do not where the decay has a floor: with log a > -0.61, as in RWKV-7,
c = 32 and m half of what a chunk can fade, both are below e^9.7, and no factor loses precision by being large. m is not
the middle of the decays at hand: then rounding would see the future. Sums are float32 at least, under autocast too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmx.parts.delta import unit_lower_inverse
from llmx.parts.linear_attention import carry_moved, chunked, joined


def dplr(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    read: Tensor,
    write: Tensor,
    lowest: float,
    state: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """All tokens, from any state. `read` is r, and `write` is b.

    query, key, read and write (B, T, H, K), value (B, T, H, V), log_decay (B, T, H, K) between `lowest` and 0, and the
    S before the first token, (B, H, K, V), else zeros -> (B, T, H, V) in the dtype of the value, and S after the last
    token, in float32 at least. Raises ValueError for a floor so low that a chunk could fade by more than e^80.
    """
    if -lowest * chunk > 80:  # beyond it exponentials leave float32
        raise ValueError(f"lowest: {chunk} tokens that fade by {lowest:.3g} each are beyond float32")
    time, dtype = value.shape[1], value.dtype
    chunk = min(chunk, time)
    with torch.autocast(value.device.type, enabled=False):
        query, key, value, log_decay, read, write = (
            chunked(x, chunk) for x in (query, key, value, log_decay, read, write)
        )  # (B, N, H, c, K)
        total = log_decay.cumsum(-2)  # G_t
        last = total[..., -1:, :].transpose(-1, -2)
        middle = lowest * chunk / 2
        grown = (total - middle).exp()
        query = query * grown
        read = read * F.pad(grown[..., :-1, :], (0, 0, 1, 0), value=math.exp(-middle))  # G_{t-1}
        shrunk = (middle - total).exp()
        write, key = ((x * shrunk).transpose(-1, -2) for x in (write, key))  # (B, N, H, K, c)
        query_write, query_key = (query @ write).tril(), (query @ key).tril()
        inverse = unit_lower_inverse(-(read @ write))
        alone = inverse @ ((read @ key).tril(-1) @ value)  # u where S_0 = 0
        mixed = query_write @ alone + query_key @ value
        add = (last - middle).exp() * (write @ alone + key @ value)  # C, (B, N, H, K, V)
        if state is None and value.shape[1] == 1:  # one chunk with nothing before it
            return joined(mixed, time).to(dtype), add[:, 0]
        in_state = inverse @ read  # u = in_state exp(m) S_0 + alone
        one = torch.eye(write.shape[-2], dtype=write.dtype, device=write.device)
        move = last.exp() * (one + write @ in_state)  # M, (B, N, H, K, K)
        past, state = carry_moved(move, add, state)
        mixed = mixed + (query + query_write @ in_state) @ (math.exp(middle) * past)
    return joined(mixed, time).to(dtype), state
