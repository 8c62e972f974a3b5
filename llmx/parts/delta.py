"""The delta rule in chunks: a memory that erases what a key already holds before it writes there.

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T            (K, V) a head; |k_t| = 1, b_t in (0, 2)
        = diag(a_t) S_{t-1} + k_t u_t^T,    u_t = b_t (v_t - (diag(a_t) S_{t-1})^T k_t),        o_t = S_t^T q_t

`delta_rule` has one decay a_t a head (arXiv 2412.06464) or none (2406.06484), and may write several keys before a query
reads (2502.10297). `vector_delta_rule` has one a channel of the key (2510.26692). Inside a chunk of c tokens, with
g_ts = sum of log a over s < r <= t,

    u_t + b_t sum_{s < t} (k_t . exp(g_ts) k_s) u_s = b_t (v_t - S_0^T exp(g_t0) k_t)

is a triangular system with ones on its diagonal, whose inverse is applied to v and to the part in S_0. From chunk to
chunk S -> M S + C. Time O(T (c + K) (K + V)) a head in T / c dependent steps, memory O(T (c + K)) and K (K + V) numbers
for each chunk. The state is S, K V numbers a head. The traps: the decay comes before the erasure, so the erased value
has faded. The triangle is strict. exp(-sum of log a) overflows. The difference of two long sums has lost the short one,
so here every g_ts is a sum of its own, of numbers with one sign. Sums are float32 at least, under autocast too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmx.parts.linear_attention import carry_moved, chunked, joined, plus_product
from llmx.parts.precision import at_least_float32
from llmx.parts.vector_scores import vector_scores


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension, in float32 at least: zeros stay zeros, with a finite gradient."""
    x = at_least_float32(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def unit_heads(u: Tensor, key_heads: int, key_dim: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key (B, T, G, K) of length 1, the query / sqrt(K), and value (B, T, H, V), from the convolution's
    output (B, T, 2 G K + H V), without T in `step`."""
    keys = key_heads * key_dim
    query, key, value = F.silu(u).split((keys, keys, u.shape[-1] - 2 * keys), -1)
    query, key = (l2_norm(y.unflatten(-1, (key_heads, key_dim))) for y in (query, key))
    return query * key_dim**-0.5, key, value.unflatten(-1, (heads, -1))


def check_rate(beta_max: float) -> None:
    """Raises ValueError for a largest beta with which the memory could grow, or would never be written."""
    if not 0 < beta_max <= 2:
        raise ValueError(f"beta_max: {beta_max} is not above 0 and up to 2")


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """One decay a head, or none; T keys, and a query after every n of them.

    query (B, T / n, G, K), key (B, T, G, K) of length 1 or less, value (B, T, H, V), beta (B, T, H) between 0 and 2,
    log_decay (B, T, H) not above 0, and the S before the first token, (B, H, K, V), else zeros -> (B, T / n, H, V) in
    the dtype of the value, and S after the last token, in float32 at least. Value head h reads group h // (H / G). The
    c keys of a chunk are rounded down to whole queries, n at least.
    """
    time, groups, queries = key.shape[1], key.shape[2], query.shape[1]
    each = time // queries  # n
    chunk = min(max(chunk // each, 1), queries) * each
    with torch.autocast(value.device.type, enabled=False):
        faded = query = chunked(query, chunk // each)[:, :, :, None]  # (B, N, G, 1, c / n, K)
        read = right = key = chunked(key, chunk)[:, :, :, None]  # (B, N, G, 1, c, K)
        values, rate = (chunked(x, chunk).unflatten(2, (groups, -1)) for x in (value, beta))
        from_query, from_key = (x @ key.transpose(-1, -2) for x in (query, key))
        fade = None
        if log_decay is not None:
            log_decay = chunked(log_decay, chunk).unflatten(2, (groups, -1))  # (B, N, G, R, c), R = H / G
            total = log_decay.cumsum(-1).exp()[..., None]
            later = log_decay.new_ones(chunk, chunk).tril(-1)
            between = (log_decay[..., None] * later).cumsum(-2).exp()  # exp(g_ts), (B, N, G, R, c, c)
            fade = total[..., -1:, :]
            faded, read = query * total[..., each - 1 :: each, :], key * total
            right = key * between[..., -1, :, None]
            from_query, from_key = from_query * between[..., each - 1 :: each, :], from_key * between
        if state is not None:
            state = state.unflatten(1, (groups, -1))
        if each == 1:
            from_query = from_query.tril(0)
        else:  # query i sees the first n (i + 1) keys
            from_query = from_query * from_query.new_ones(chunk, chunk).tril()[each - 1 :: each]
        mixed, state = _solve(from_query, from_key, faded, read, right, values, rate[..., None], fade, state)
    return joined(mixed.flatten(2, 3), queries).to(value.dtype), state.flatten(1, 2)


def vector_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """The same with a decay a channel of the key, (B, T, H, K); H heads of keys, n = 1; the chunk is a power of 2."""
    time = value.shape[1]
    chunk = min(chunk, 1 << (time - 1).bit_length())
    with torch.autocast(value.device.type, enabled=False):
        query, key, values, rate, log_decay = (chunked(x, chunk) for x in (query, key, value, beta, log_decay))
        # a view, because a compiler refuses one tensor for two arguments
        total, left, from_query, from_key = vector_scores(key, log_decay, query, key.view_as(key))
        fade = total[..., -1:, :].exp().transpose(-1, -2)  # (B, N, H, K, 1)
        total = total.exp()
        right = key * left.exp()
        mixed, state = _solve(
            from_query, from_key, query * total, key * total, right, values, rate[..., None], fade, state
        )
    return joined(mixed, time).to(value.dtype), state


def delta_step(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token: query and key (B, H, K), value (B, H, V), beta (B, H), a log decay that broadcasts to
    (B, H, K), state (B, H, K, V) -> (B, H, V) in the dtype of the value, and the state."""
    state = delta_write(key, value, beta, log_decay, state)
    with torch.autocast(value.device.type, enabled=False):
        return (query.to(state.dtype)[..., None, :] @ state)[..., 0, :].to(value.dtype), state


def delta_write(key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The same without a query: the state alone."""
    with torch.autocast(value.device.type, enabled=False):
        key, value, beta = (x.to(state.dtype) for x in (key, value, beta))
        if log_decay is not None:
            state = log_decay.to(state.dtype).exp()[..., None] * state
        held = (key[..., None, :] @ state)[..., 0, :]  # (B, H, V)
        return state + key[..., None] * (beta[..., None] * (value - held))[..., None, :]


def _solve(
    from_query: Tensor,
    from_key: Tensor,
    query: Tensor,
    read: Tensor,
    right: Tensor,
    value: Tensor,
    beta: Tensor,
    fade: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The common part of all kinds of decay.

    from_query (B, N, ..., c / n, c) and from_key (B, N, ..., c, c) are the scores in a chunk; only the lower triangle
    of from_key is read. query, read (both faded since S_0) and right (fading until the end) are (B, N, ..., c, K);
    value (B, N, ..., c, V), beta (B, N, ..., c, 1), fade of a whole chunk broadcasting to (B, N, ..., K, 1), state
    (B, ..., K, V) -> (B, N, ..., c / n, V), and the state.
    """
    # one chunk with nothing before it; a single token goes the long way, so that a decay without effect has a gradient
    only = state is None and value.shape[1] == 1 < value.shape[-2]
    inverse = unit_lower_inverse(beta * from_key) * beta.transpose(-1, -2)
    update = inverse @ value  # u where S_0 = 0
    right = right.transpose(-1, -2)
    add = right @ update  # C, (B, N, ..., K, V)
    mixed = from_query @ update
    if only:
        return mixed, add[:, 0]
    in_state = inverse @ -read  # the part of u in S_0
    one = torch.eye(right.shape[-2], dtype=right.dtype, device=right.device)
    move = right @ in_state + (one if fade is None else one * fade)  # M, (B, N, ..., K, K)
    past, state = carry_moved(move, add, state)
    return plus_product(mixed, plus_product(query, from_query, in_state), past), state


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """X = (I + L)^{-1} of the part L below the diagonal of (..., c, c), in time O(c^3). The rest is not read.

    dL = -X^T dX X^T. Solving for the right-hand sides instead takes one triangular solve forward and one backward,
    which run at a tenth of the rate of products here.
    """
    return _Inverse.apply(lower)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        # transposed and from the right, as the library stores its matrices: half the time, and no copies
        turned = torch.linalg.solve_triangular(lower.mT, one, upper=True, left=False, unitriangular=True)
        inverse = turned.mT.contiguous()
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return (turned @ gradient @ turned).tril(-1).neg_()
