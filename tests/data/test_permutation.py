import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmx.data.windows import permuted


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64), epoch=st.integers(0, 9))
@example(size=1, seed=0, epoch=0)
@example(size=1024, seed=0, epoch=0)
@example(size=1025, seed=0, epoch=0)
def test_every_index_is_reached_exactly_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, (seed, epoch)).tolist()) == list(range(size))


def test_the_image_of_an_index_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = permuted(np.arange(1000), 1000, (3, 1))
    some = np.array([999, 0, 17, 500])
    assert (permuted(some, 1000, (3, 1)) == whole[some]).all()


def test_each_part_of_the_key_gives_another_order() -> None:
    orders = {tuple(permuted(np.arange(50), 50, (seed, epoch)).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [10**10, 2**40 + 1, 2**62])
def test_sizes_beyond_memory_are_sampled_evenly_and_without_repetition(size: int) -> None:
    images = permuted(np.arange(100_000) + size // 3, size, (0, 0))
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == 100_000
    for numbers in (images, np.diff(images) % size):  # where indices go, and how far neighbours are apart
        counts = np.bincount((numbers / size * 100).astype(int), minlength=100)
        assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared of 99 degrees: above by chance once in 10,000
