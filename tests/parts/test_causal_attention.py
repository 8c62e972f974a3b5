"""The written-out attention against PyTorch's own, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from llmx.parts.attention import causal_attention, masked_attention, past_attention

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order


def heads(batch: int, heads: int, groups: int, time: int, width: int, value: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, time, width), (batch, groups, time, width), (batch, groups, time, value)
    query, key, value_ = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return query, key, value_


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 4),
    time=st.integers(1, 9),
    width=st.integers(1, 6),
    value=st.integers(1, 6),
)
def test_causal_attention_is_scaled_dot_product_attention(
    batch: int, groups: int, repeats: int, time: int, width: int, value: int
):
    q, k, v = heads(batch, groups * repeats, groups, time, width, value)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(causal_attention(q, k, v), expected, **EXACT)


def test_gradients_are_those_of_scaled_dot_product_attention():
    q, k, v = (x.requires_grad_() for x in heads(2, 6, 2, 5, 4, 3))
    upstream = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    ours = torch.autograd.grad(causal_attention(q, k, v), (q, k, v), upstream)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(ours, torch.autograd.grad(theirs, (q, k, v), upstream), **EXACT)


def test_grouped_heads_repeat_each_key_head_for_neighbouring_query_heads():
    q, k, v = heads(2, 6, 2, 5, 4, 3)
    neighbours = causal_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    in_turn = causal_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))
    assert_close(causal_attention(q, k, v), neighbours, **EXACT)
    assert (causal_attention(q, k, v) - in_turn).abs().max() > 0.1  # the trap gives something else


def test_masked_attention_leaves_hidden_slots_out_for_each_row():
    q, k, v = heads(2, 4, 2, 3, 4, 4)
    visible = torch.tensor([[[1, 1, 0], [1, 0, 1], [0, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]], dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
    bias = torch.zeros(2, 1, 1, 3, 3, dtype=q.dtype).masked_fill(~visible[:, None, None], float("-inf"))
    assert_close(masked_attention(q, k, v, bias), expected, **EXACT)


@pytest.mark.parametrize("shape", [(2, 1, 1, 3, 5), (1, 2, 3, 3, 5), (2, 2, 1, 1, 5), (1, 1, 3, 3, 1)])
@pytest.mark.parametrize("value", [4, 3])
@pytest.mark.parametrize("over", [{}, {"cap": 2.0}, {"sink": torch.arange(6.0).double()}])
def test_past_attention_is_masked_attention_whatever_the_bias_broadcasts_over(shape, value, over):
    q, k, v = heads(2, 6, 2, 5, 4, value)
    bias = torch.randn(shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = [x.requires_grad_() for x in (q[:, :, :3].clone(), k, v)] + [bias]
    ours, expected = past_attention(*inputs, **over), masked_attention(*inputs, **over)
    assert_close(ours, expected, **EXACT)
    upstream = torch.randn(ours.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    assert_close(*(torch.autograd.grad(x, inputs, upstream) for x in (ours, expected)), **EXACT)


def test_dropout_changes_the_output_and_keeps_its_expectation():
    torch.manual_seed(0)
    q, k, v = heads(1, 2, 1, 4, 4, 3)
    draws = torch.stack([causal_attention(q, k, v, dropout=0.3)[0] for _ in range(2000)])
    error = (draws.mean(0) - causal_attention(q, k, v)[0]).abs()
    assert (draws.std(0) > 0).all()
    assert (error < 5 * draws.std(0) / len(draws) ** 0.5).all()  # five standard errors of the mean, at a fixed seed


@pytest.mark.parametrize("magnitude", [1e3, 1e6])
def test_huge_scores_stay_finite(magnitude: float):
    q, k, v = heads(1, 2, 2, 5, 4, 3)
    assert causal_attention(q * magnitude, k * magnitude, v).isfinite().all()
