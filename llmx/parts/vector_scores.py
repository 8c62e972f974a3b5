"""Scores inside a chunk where each channel of the key decays by itself, shared by GLA, HGRN2 and KDA.

    w_ts = r_t . exp(g_ts) k_s,  s <= t,     g_ts the sum of log a over s < u <= t, (K,)

Blocks start as single tokens and are joined in pairs. A pair splits the decay from s to t at the end e of its first
block: exp(g_te) r_t and exp(g_es) k_s, a product of matrices. Time O(c^2 K), memory O(c K log c) for c tokens. The
trap: with a split anywhere else, one of the factors overflows. A g from a difference of two long sums would lose a
short decay, so here every g is a sum of its own, of numbers with one sign.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def vector_scores(key: Tensor, log_decay: Tensor, *readers: Tensor) -> tuple[Tensor, ...]:
    """The scores of every reader r.

    key, log_decay (not above 0) and readers (..., c, K), c a power of 2 -> g from the start to t and from t to the end,
    (..., c, K), and w of each reader, (..., c, c), 0 where t < s.
    """
    return _VectorScores.apply(key, log_decay, *readers)


class _VectorScores(torch.autograd.Function):
    """The scores with their own backward pass, because autograd would copy everything for every block size."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, log_decay: Tensor, *readers: Tensor) -> tuple[Tensor, ...]:
        chunk, size = key.shape[-2], 1
        scores = key.new_zeros(len(readers), *key.shape[:-1], chunk).unbind()
        for reader, own in zip(readers, scores, strict=True):
            own.diagonal(0, -2, -1).copy_((reader * key).sum(-1))
        total = log_decay.clone()  # from the start of a block
        left = torch.zeros_like(total)  # to its end
        factors = []
        while size < chunk:
            (total1, total2), (left1, _) = _halves(total, size), _halves(left, size)
            grown, shrunk = total2.exp(), left1.exp()  # (..., M, size, K)
            late = torch.stack([_halves(reader, size)[1] * grown for reader in readers], -3)
            early = _halves(key, size)[0] * shrunk
            across = late.flatten(-3, -2) @ early.transpose(-1, -2)
            for own, part in zip(scores, across.unflatten(-2, (-1, size)).unbind(-3), strict=True):
                _across(own, size).copy_(part)
            factors += [grown, shrunk, late, early]
            left1 += total2[..., -1:, :]
            total2 += total1[..., -1:, :]
            size *= 2
        ctx.save_for_backward(key, *readers, *factors)
        ctx.readers = len(readers)
        return total, left, *scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_left: Tensor, *of_scores: Tensor) -> tuple[Tensor, ...]:
        key, *readers = ctx.saved_tensors[: 1 + ctx.readers]
        factors = ctx.saved_tensors[1 + ctx.readers :]
        of_total, of_left = of_total.clone(), of_left.clone()
        alone = [own.diagonal(0, -2, -1)[..., None] for own in of_scores]
        of_key = torch.zeros_like(key)
        for own, reader in zip(alone, readers, strict=True):
            of_key.addcmul_(own, reader)
        of_readers = [own * key for own in alone]
        size = key.shape[-2]
        while size > 1:
            size //= 2
            grown, shrunk, late, early = factors[-4:]
            factors = factors[:-4]
            (of_total1, of_total2), (of_left1, _) = _halves(of_total, size), _halves(of_left, size)
            of_total1[..., -1, :] += of_total2.sum(-2)
            of_total2[..., -1, :] += of_left1.sum(-2)
            of_across = torch.cat([_across(own, size) for own in of_scores], -2)  # (..., M, readers size, size)
            of_late = _product(of_across, early).unflatten(-2, (-1, size)).unbind(-3)
            of_early = _product(of_across.transpose(-1, -2), late.flatten(-3, -2))
            for of_reader, of_part, part in zip(of_readers, of_late, late.unbind(-3), strict=True):
                of_total2.addcmul_(of_part, part)
                _halves(of_reader, size)[1].addcmul_(of_part, grown)
            of_left1.addcmul_(of_early, early)
            _halves(of_key, size)[0].addcmul_(of_early, shrunk)
        return of_key, of_total, *of_readers


def _halves(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cuts (..., c, K) into blocks of 2 size tokens: their first and second halves, (..., M, size, K) each."""
    return x.unflatten(-2, (-1, 2, size)).unbind(-3)


def _across(scores: Tensor, size: int) -> Tensor:
    """The scores (..., c, c) of second halves of blocks over first halves, as a view (..., M, size, size)."""
    blocks = scores.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))  # (..., M, 2, size, M, 2, size)
    return blocks[..., 1, :, :, 0, :].diagonal(0, -4, -2).movedim(-1, -3)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; tiny inner sizes are faster by broadcasting."""
    if left.shape[-1] == 1:
        return left * right
    if min(left.shape[-2:]) > 2:
        return left @ right
    return (left[..., None] * right[..., None, :, :]).sum(-2)
