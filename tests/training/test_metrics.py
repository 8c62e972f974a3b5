import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from llmx.protocol import IGNORE
from llmx.training.metrics import TokenLoss, bits, perplexity


def batch(rows: int, time: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Losses and targets, some of them IGNORE (their losses 0), the first never."""
    generator = torch.Generator().manual_seed(seed)
    losses = 5 * torch.rand(rows, time, generator=generator)
    targets = torch.randint(9, (rows, time), generator=generator)
    ignored = torch.rand(rows, time, generator=generator) < 0.3
    ignored[0, 0] = False
    return losses.masked_fill(ignored, 0.0), targets.masked_fill(ignored, IGNORE)


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4)


@given(shapes)
def test_token_loss_is_the_mean_over_counted_tokens_however_they_are_batched(shapes: list[tuple[int, int]]):
    metric = TokenLoss()
    counted = []
    for seed, shape in enumerate(shapes):
        losses, targets = batch(*shape, seed)
        metric.update(losses, targets)
        counted.append(losses[targets != IGNORE])
    assert_close(metric.compute(), torch.cat(counted).double().mean(), rtol=1e-12, atol=0)


def test_token_loss_weighs_tokens_and_not_batches():
    metric = TokenLoss()
    metric.update(torch.full((1, 1), 4.0), torch.zeros(1, 1, dtype=torch.int64))
    metric.update(torch.full((1, 3), 0.0), torch.zeros(1, 3, dtype=torch.int64))
    assert metric.compute() == 1.0


def test_the_states_of_two_processes_add_up_to_that_of_one():
    one, left, right = TokenLoss(), TokenLoss(), TokenLoss()
    for seed in range(5):
        losses, targets = batch(3, 4 + seed, seed)
        one.update(losses, targets)
        (left if seed % 3 else right).update(losses, targets)
    left.merge_state(right)
    assert_close(left.compute(), one.compute(), rtol=1e-12, atol=0)
    assert left.count == one.count


def test_reset_forgets():
    metric = TokenLoss()
    metric.update(torch.full((2, 2), 9.0), torch.zeros(2, 2, dtype=torch.int64))
    metric.compute()
    metric.reset()
    metric.update(torch.full((2, 2), 1.0), torch.zeros(2, 2, dtype=torch.int64))
    assert metric.compute() == 1.0


def test_token_loss_sums_in_float64():
    metric, ones = TokenLoss(), torch.zeros(1, 1, dtype=torch.int64)
    metric.update(torch.full((1, 1), 2.0**25), ones)
    for _ in range(3):
        metric.update(torch.ones(1, 1), ones)  # float32 loses a 1 beside 2^25
    assert metric.compute() * 4 == 2.0**25 + 3


@pytest.mark.parametrize("loss", [0.0, 1.0, 4.17])
def test_perplexity_is_the_exponential(loss: float):
    assert perplexity(loss) == math.exp(loss)


@pytest.mark.parametrize("loss", [710.0, 1e6, math.inf])
def test_perplexity_of_a_huge_loss_is_inf_and_no_exception(loss: float):
    assert perplexity(loss) == math.inf


def test_perplexity_of_nan_is_nan():
    assert math.isnan(perplexity(math.nan))


def test_bits_of_the_uniform_distribution_over_256_are_8():
    assert bits(math.log(256)) == pytest.approx(8)
