"""Linear attention with decay, in chunks: a matrix as memory, written by outer products, read by the query.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        (K, V) a head; a_t = exp(log_decay_t) in (0, 1]
    o_t = S_t^T q_t  =  sum_{s <= t} (q_t . exp(G_t - G_s) k_s) v_s + S_0^T (exp(G_t) q_t),     G the sums of log a

`scalar_decay` has one a_t a head, as RetNet, lightning attention and Mamba-2. `vector_decay` has one a channel of the
key, as GLA and HGRN2. Inside a chunk of c tokens the sum is taken as it stands, between chunks S is carried: time
O(T (c + K) V), memory O(T c) for the scores and K V numbers for each chunk. The state is S, K V numbers a head.

The trap: exp(G_t - G_s) as a product of exp(G_t) q_t and exp(-G_s) k_s turns everything into matrix products, but
overflows as soon as a chunk forgets by e^88. Here no exponent is ever positive: a scalar decay has its differences
taken pair by pair. A vector decay has them split at a token r between s and t (llmx/parts/vector_scores.py). All sums
are float32 at least, under autocast too. Where outputs are bfloat16, so are their factors, but never those of S.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmx.parts.precision import at_least_float32
from llmx.parts.vector_scores import vector_scores


def scalar_decay(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """One decay a head and token.

    query and key (B, T, G, K), value (B, T, H, V), log_decay (B, T, H), or (1, T, H) for all rows, not above 0, and the
    S before the first token, (B, H, K, V), else zeros -> (B, T, H, V) in the dtype of the value, and S after the last
    token, in float32 at least. Value head h reads group h // (H / G).
    """
    time, groups = value.shape[1], key.shape[2]
    chunk = min(chunk, time)
    with torch.autocast(value.device.type, enabled=False):
        query, key = (chunked(x, chunk)[:, :, :, None] for x in (query, key))  # (B, N, G, 1, c, K)
        values, log_decay = (chunked(x, chunk).unflatten(2, (groups, -1)) for x in (value, log_decay))
        total = log_decay.cumsum(-1)  # (B, N, G, R, c), R = H / G
        ahead = torch.full((chunk, chunk), float("-inf"), dtype=total.dtype, device=total.device).triu(1)
        decay = (total[..., :, None] + (-total)[..., None, :]).add_(ahead).exp_()
        scores = reading(query, key.transpose(-1, -2), value.dtype) * decay
        mixed = reading(scores, values, value.dtype)
        left = (total[..., -1:] - total).exp()[..., None]  # each token's share at the end of the chunk
        local = (key * left).transpose(-1, -2) @ values  # (B, N, G, R, K, V)
        if state is not None:
            state = state.unflatten(1, (groups, -1))
        before, state = carry(local, total[..., -1:, None].exp(), state)
        if before is not None:
            mixed = reading(query * total[..., None].exp(), before, value.dtype, mixed)
    return joined(mixed.flatten(2, 3), time).to(value.dtype), state.flatten(1, 2)


def vector_decay(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """The same with a decay a channel of the key, (B, T, H, K); H heads of keys, and the chunk is a power of 2."""
    time = value.shape[1]
    chunk = min(chunk, 1 << (time - 1).bit_length())
    with torch.autocast(value.device.type, enabled=False):
        query, key, values, log_decay = (chunked(x, chunk) for x in (query, key, value, log_decay))  # (B, N, H, c, K)
        total, left, scores = vector_scores(key, log_decay, query)
        mixed = reading(scores, values, value.dtype)
        local = (key * left.exp()).transpose(-1, -2) @ values  # (B, N, H, K, V)
        total = total.exp()
        before, state = carry(local, total[..., -1:, :].transpose(-1, -2), state)
        if before is not None:
            mixed = reading(query * total, before, value.dtype, mixed)
    return joined(mixed, time).to(value.dtype), state


def decay_step(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, one token: query and key (B, H, K), value (B, H, V), state (B, H, K, V), and a log decay that
    broadcasts to (B, H, K) -> (B, H, V) in the dtype of the value, and the state."""
    with torch.autocast(value.device.type, enabled=False):
        query, key, new, log_decay = (x.to(state.dtype) for x in (query, key, value, log_decay))
        state = log_decay.exp()[..., None] * state + key[..., None] * new[..., None, :]
        return (query[..., None, :] @ state)[..., 0, :].to(value.dtype), state


def chunked(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, ...) -> (B, N, H, c, ...) in float32 at least, with zeros after the last token: a key of 0 and a log
    decay of 0 leave the memory as it is."""
    missing = -x.shape[1] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    x = x.unflatten(1, (-1, chunk)).transpose(2, 3)
    # one copy instead of one in every matrix product
    return at_least_float32(x).contiguous()


def reading(left: Tensor, right: Tensor, dtype: torch.dtype, more: Tensor | None = None) -> Tensor:
    """left @ right + more, for outputs only, never for the state.

    If the outputs' `dtype` is bfloat16, so are the factors: about twice as fast, and sums stay in float32.
    """
    if dtype == torch.bfloat16:
        left, right = left.to(dtype), right.to(dtype)
    return left @ right if more is None else plus_product(more, left, right)


def plus_product(more: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """more + left @ right in one pass over memory."""
    batch = torch.broadcast_shapes(more.shape[:-2], left.shape[:-2], right.shape[:-2])
    more, left, right = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (more, left, right))
    return torch.baddbmm(more, left, right).unflatten(0, batch)


def joined(x: Tensor, time: int) -> Tensor:
    """(B, N, H, c, V) -> (B, T, H, V)"""
    return x.transpose(2, 3).flatten(1, 2)[:, :time]


def carry(local: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The memory before each chunk, (B, N, ...), and after the last, from what each chunk adds, (B, N, ...), and its
    decay, which broadcasts to it. None where nothing comes before the only chunk."""
    if state is None:
        if local.shape[1] == 1:
            return None, local[:, 0]
        state = torch.zeros_like(local[:, 0])
    return _Carry.apply(local, decay, state.to(local.dtype))


class _Carry(torch.autograd.Function):
    """C (B, N, ...), a, S_0 (B, ...) -> S_0 to S_{N-1}, (B, N, ...), and S_N, of S_{n+1} = a_n S_n + C_n.

    The gradient of S_n is g_n = dL/dS_n + a_n g_{n+1}; dC_n = g_{n+1} and da_n = g_{n+1} S_n.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.empty(local.shape, dtype=local.dtype, device=local.device)
        before[:, 0] = state
        for n in range(local.shape[1] - 1):
            torch.addcmul(local[:, n], decay[:, n], before[:, n], out=before[:, n + 1])
        ctx.save_for_backward(decay, before)
        return before, torch.addcmul(local[:, -1], decay[:, -1], before[:, -1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_before: Tensor, of_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, before = ctx.saved_tensors
        of_local, of_decay = torch.empty_like(before), torch.empty_like(decay)
        for n in range(before.shape[1])[::-1]:
            of_local[:, n] = of_last
            of_decay[:, n] = (of_last * before[:, n]).sum_to_size(decay[:, n].shape)
            of_last = torch.addcmul(of_before[:, n], decay[:, n], of_last)
        return of_local, of_decay, of_last


def carry_moved(move: Tensor, add: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for S -> M S + C: from M (B, N, ..., K, K) and C (B, N, ..., K, V) the memory before each chunk,
    (B, N, ..., K, V), and after the last."""
    state = torch.zeros_like(add[:, 0]) if state is None else state.to(add.dtype)
    before, last = _CarryMoved.apply(move.flatten(2, -3), add.flatten(2, -3), state.flatten(1, -3))
    return before.unflatten(2, state.shape[1:-2]), last.unflatten(1, state.shape[1:-2])


class _CarryMoved(torch.autograd.Function):
    """M (B, N, H, K, K), C (B, N, H, K, V), S_0 (B, H, K, V) -> S_0 to S_{N-1}, (B, N, H, K, V), and S_N.

    The gradient of S_n is g_n = dL/dS_n + M_n^T g_{n+1}; all dM_n = g_{n+1} S_n^T are one product; dC_n = g_{n+1}.
    """

    @staticmethod
    def forward(ctx: Any, move: Tensor, add: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        rows = state.shape[:2]
        move = move.transpose(0, 1).flatten(1, 2)  # (N, B H, K, K)
        states = torch.cat((state[None], add.transpose(0, 1))).flatten(1, 2)
        for n, m in enumerate(move):
            states[n + 1].baddbmm_(m, states[n])
        ctx.save_for_backward(move, states)
        return states[:-1].unflatten(1, rows).transpose(0, 1), states[-1].unflatten(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_before: Tensor, of_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        move, states = ctx.saved_tensors
        gradient = torch.cat((of_before.transpose(0, 1), of_last[None])).flatten(1, 2)
        for n in range(len(move))[::-1]:
            gradient[n].baddbmm_(move[n].transpose(-1, -2), gradient[n + 1])
        of_move = gradient[1:] @ states[:-1].transpose(-1, -2)
        of_move, gradient = (x.unflatten(1, of_last.shape[:2]).transpose(0, 1) for x in (of_move, gradient))
        return of_move, gradient[:, 1:], gradient[:, 0]
