import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from llmx.parts.norm import DyT, GainlessRMSNorm, RMSNorm


def norm(dim: int, eps: float = 1e-5) -> RMSNorm:
    made = RMSNorm(dim, eps).double()
    nn.init.normal_(made.weight)
    return made


@given(lead=st.lists(st.integers(1, 4), max_size=3), dim=st.integers(1, 9), eps=st.sampled_from([1e-6, 1e-5, 0.1]))
def test_rms_norm_is_that_of_pytorch_and_of_its_equation(lead: list[int], dim: int, eps: float):
    ours = norm(dim, eps)
    theirs = nn.RMSNorm(dim, eps).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*lead, dim, dtype=torch.float64)
    assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    equation = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * ours.weight
    assert_close(ours(x), equation, rtol=1e-12, atol=1e-12)


def test_rms_norm_treats_every_vector_by_itself():
    ours = norm(6)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    changed = x.clone()
    changed[1, 3] = 100.0
    same = torch.ones(3, 5, dtype=torch.bool)
    same[1, 3] = False
    assert torch.equal(ours(x)[same], ours(changed)[same])
    assert not torch.equal(ours(x)[1, 3], ours(changed)[1, 3])


def test_rms_norm_starts_with_root_mean_square_1():
    x = 7 * torch.randn(4, 64)
    rms = RMSNorm(64)(x).square().mean(-1).sqrt()
    assert_close(rms, torch.ones(4), rtol=1e-4, atol=0)  # eps 1e-5 over a mean square near 49, float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_keeps_the_dtype_of_its_input(dtype: torch.dtype):
    assert RMSNorm(4)(torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_dyt_is_its_equation_with_one_slope_and_no_statistic():
    made = DyT(6, alpha=0.8).double()
    assert made.alpha.shape == ()
    assert made.alpha.item() == pytest.approx(0.8)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    up, down = (made.alpha * x).exp(), (-made.alpha * x).exp()
    assert_close(made(x), made.weight * (up - down) / (up + down) + made.bias, rtol=1e-12, atol=1e-12)
    changed = x.clone()
    changed[1, 3, 2] = 100.0
    assert (made(x) != made(changed)).sum() == 1  # not even the other channels of its vector notice


def test_dyt_passes_small_numbers_on_as_small_as_they_are():
    x = 0.02 * torch.randn(4, 64)
    assert_close(DyT(64, alpha=1.0)(x), x, rtol=1e-2, atol=0)
    assert RMSNorm(64)(x).square().mean().sqrt() > 0.9


def test_without_a_gain_it_is_the_norm_whose_gain_is_1():
    x = torch.randn(5, 16, dtype=torch.float64)
    plain = GainlessRMSNorm(16)
    assert not list(plain.parameters())
    assert torch.equal(plain(x), RMSNorm(16).double()(x))
