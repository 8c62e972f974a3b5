"""Scores inside a chunk with a decay a channel, against one pair of tokens after the other."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.parts.vector_scores import vector_scores

F64 = {"rtol": 1e-10, "atol": 1e-10}  # the same sums in another order


def naive(key: Tensor, log_decay: Tensor, *readers: Tensor) -> tuple[Tensor, ...]:
    chunk = key.shape[-2]
    total = log_decay.cumsum(-2)
    left = torch.stack([log_decay[..., t + 1 :, :].sum(-2) for t in range(chunk)], -2)
    zero = key.new_zeros(key.shape[:-2])

    def score(reader: Tensor, t: int, s: int) -> Tensor:
        if s > t:
            return zero
        decay = log_decay[..., s + 1 : t + 1, :].sum(-2).exp()
        return (reader[..., t, :] * decay * key[..., s, :]).sum(-1)

    rows = ([torch.stack([score(r, t, s) for s in range(chunk)], -1) for t in range(chunk)] for r in readers)
    return total, left, *(torch.stack(row, -2) for row in rows)


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 2, 4, 16])
def test_scores_and_their_gradients_are_those_of_the_pairs(chunk: int, readers: int):
    torch.manual_seed(0)
    shape = (2, 3, chunk, 5)
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(1 + readers)]
    tensors.insert(1, -torch.rand(shape, dtype=torch.float64))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    found, expected = vector_scores(*leaves), naive(*leaves)
    weights = [torch.randn(output.shape, dtype=torch.float64) for output in expected]
    assert_close(found, expected, **F64)
    gradients = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, way, strict=True)), leaves)
        for way in (found, expected)
    ]
    assert_close(*gradients, **F64)


def test_a_key_may_read_itself():
    torch.manual_seed(0)
    key = torch.randn(4, 8, 3, dtype=torch.float64, requires_grad=True)
    log_decay = -torch.rand(4, 8, 3, dtype=torch.float64)
    found, expected = (way(key, log_decay, key.view_as(key))[2] for way in (vector_scores, naive))
    weights = torch.randn(found.shape, dtype=torch.float64)
    assert_close(*(torch.autograd.grad((weights * x).sum(), key) for x in (found, expected)), **F64)


@pytest.mark.parametrize("decay", [-1e4, -1e-6])
def test_extreme_decays_stay_finite_in_float32(decay: float):
    torch.manual_seed(0)
    key, reader = torch.randn(2, 1, 32, 4)
    leaves = [key.requires_grad_(), torch.full((1, 32, 4), decay).requires_grad_(), reader.requires_grad_()]
    *_, scores = vector_scores(*leaves)
    exact = naive(*(leaf.detach().double() for leaf in leaves))[2]
    assert_close(scores.detach().double(), exact, rtol=1e-5, atol=1e-5)  # float32 sums of four numbers
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(scores.sum(), leaves))
