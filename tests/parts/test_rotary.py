import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from llmx.parts.rotary import rotary_table, rotate

F64 = torch.float64
BASE = 10000.0


@given(position=st.integers(0, 5000), half=st.integers(1, 6), base=st.sampled_from([100.0, BASE]))
def test_rotate_turns_the_pair_i_and_i_plus_half_as_a_complex_number(position: int, half: int, base: float):
    x = torch.randn(2 * half, dtype=F64)
    turned = rotate(x, rotary_table(torch.tensor(position), 2 * half, base, F64))
    for i in range(half):
        pair = complex(x[i], x[i + half]) * cmath.exp(1j * position * base ** (-i / half))
        assert turned[i].item() == pytest.approx(pair.real, abs=1e-9)  # angles up to 5000 in float64
        assert turned[i + half].item() == pytest.approx(pair.imag, abs=1e-9)


@given(position=st.integers(0, 100_000))
def test_rotate_keeps_the_norm(position: int):
    x = torch.randn(3, 8, dtype=F64)
    turned = rotate(x, rotary_table(torch.tensor(position), 8, BASE, F64))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)


@given(query_at=st.integers(0, 500), key_at=st.integers(0, 500), shift=st.integers(0, 500))
def test_a_product_of_rotated_vectors_depends_on_the_distance_only(query_at: int, key_at: int, shift: int):
    query, key = torch.randn(2, 8, dtype=F64)

    def product(one: int, other: int) -> torch.Tensor:
        table = rotary_table(torch.tensor([one, other]), 8, BASE, F64)
        return rotate(query, table[0]) @ rotate(key, table[1])

    assert_close(product(query_at, key_at), product(query_at + shift, key_at + shift), rtol=1e-9, atol=1e-9)


def test_position_0_is_left_alone_and_others_are_not():
    x = torch.randn(8, dtype=F64)
    assert torch.equal(rotate(x, rotary_table(torch.tensor(0), 8, BASE, F64)), x)
    assert not torch.allclose(rotate(x, rotary_table(torch.tensor(1), 8, BASE, F64)), x)


def test_angles_are_exact_in_low_precision():
    positions = torch.arange(300)
    low, exact = rotary_table(positions, 8, BASE, torch.bfloat16), rotary_table(positions, 8, BASE, F64)
    assert low.dtype == torch.bfloat16
    assert_close(low.double(), exact, rtol=0, atol=2**-8)  # bf16 keeps 8 bits; an angle in bf16 would be off by 1


def test_table_has_the_shape_of_positions():
    assert rotary_table(torch.zeros(2, 5, dtype=torch.int64), 8, BASE, torch.float32).shape == (2, 5, 2, 4)
