from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.data.windows import (
    Batch,
    EpochWindows,
    EvaluationBatches,
    KeyedEpochWindows,
    RandomWindows,
    TrainingBatches,
    WindowSampler,
)
from llmx.errors import UserError
from llmx.protocol import IGNORE

property_test = settings(max_examples=60, deadline=None)


def training(sampler: WindowSampler, window: int, start: int = 0, **slots: int) -> TrainingBatches:
    """Batches of the tokens 0, 1, 2, ..., so that a token tells its position."""
    return TrainingBatches(np.arange(sampler.windows + window), window, sampler, lambda: start, **slots)


def counted_rows(batch: Batch) -> torch.Tensor:
    return (batch.targets != IGNORE).any(1)


def starts_of(batch: Batch) -> list[int]:
    return batch.inputs[counted_rows(batch), 0].tolist()


def test_a_window_has_its_targets_one_token_later() -> None:
    for batch in training(EpochWindows(20, 5, seed=0), window=4):
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert (batch.inputs == batch.inputs[:, :1] + torch.arange(4)).all()
        assert (batch.targets == batch.inputs + 1).all()
        assert batch.inputs.is_contiguous()
        assert batch.targets.is_contiguous()


@pytest.mark.parametrize("kind", [EpochWindows, KeyedEpochWindows])
@given(windows=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
@property_test
def test_every_window_comes_exactly_once_an_epoch(
    kind: type[WindowSampler], windows: int, batch: int, seed: int, epoch: int
) -> None:
    sampler = kind(windows, batch, seed)
    batches = training(sampler, window=3, start=epoch * sampler.steps_per_epoch)
    assert sorted(start for batch in batches for start in starts_of(batch)) == list(range(windows))


@pytest.mark.parametrize("kind", [EpochWindows, KeyedEpochWindows])
def test_epochs_and_seeds_differ_in_order(kind: type[WindowSampler]) -> None:
    orders = {
        tuple(kind(50, 50, seed).starts(epoch).tolist()) for seed in range(3) for epoch in range(3)
    }  # one step an epoch
    assert len(orders) == 9


@given(windows=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 2**32))
@property_test
def test_random_windows_are_full_batches_within_bounds(windows: int, batch: int, seed: int) -> None:
    sampler = RandomWindows(windows, batch, seed)
    for step in range(5):
        starts = sampler.starts(step)
        assert len(starts) == batch
        assert ((starts >= 0) & (starts < windows)).all()


def test_random_windows_reach_every_window_about_equally() -> None:
    sampler = RandomWindows(10, 100, seed=0)
    counts = Counter(start for step in range(100) for start in sampler.starts(step).tolist())
    # 10,000 draws: a count is 1000 with standard deviation 30
    assert all(abs(counts[start] - 1000) < 150 for start in range(10))


@pytest.mark.parametrize("kind", [EpochWindows, KeyedEpochWindows, RandomWindows])
def test_windows_are_a_pure_function_of_seed_and_step(kind: type[WindowSampler]) -> None:
    steps = [7, 0, 12, 3, 7]
    once = {step: kind(50, 8, seed=3).starts(step).tolist() for step in steps}
    sampler = kind(50, 8, seed=3)
    np.random.seed(11)
    torch.manual_seed(11)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert all(sampler.starts(step).tolist() == once[step] for step in steps)
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    assert kind(50, 8, seed=4).starts(7).tolist() != once[7]


@pytest.mark.parametrize("kind", [EpochWindows, KeyedEpochWindows, RandomWindows])
def test_resuming_at_a_step_continues_as_if_uninterrupted(kind: type[WindowSampler]) -> None:
    steps = kind(50, 8, seed=3).steps_per_epoch  # 7
    whole = [
        batch.inputs.tolist()
        for epoch in range(2)
        for batch in training(kind(50, 8, seed=3), 4, start=epoch * steps, accumulate=2)
    ]
    for step in range(2 * steps):
        rest = [batch.inputs.tolist() for batch in training(kind(50, 8, seed=3), 4, start=step, accumulate=2)]
        assert rest == whole[2 * step : 2 * steps if step < steps else None]


slots = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))  # accumulate, world size, rows


@given(windows=st.integers(1, 60), slots=slots, seed=st.integers(0, 99))
@property_test
def test_slices_of_all_ranks_and_micro_batches_are_the_global_batch(
    windows: int, slots: tuple[int, int, int], seed: int
) -> None:
    accumulate, world_size, rows = slots
    sampler = EpochWindows(windows, accumulate * world_size * rows, seed)
    ranks = [
        list(training(sampler, 3, accumulate=accumulate, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {sampler.steps_per_epoch * accumulate}
    assert {batch.inputs.shape for batches in ranks for batch in batches} == {(rows, 3)}
    for step in range(sampler.steps_per_epoch):
        micros = range(step * accumulate, (step + 1) * accumulate)
        starts = [start for micro in micros for rank in ranks for start in starts_of(rank[micro])]
        assert starts == sampler.starts(step).tolist()


@given(windows=st.integers(1, 60), slots=slots)
@property_test
def test_average_of_the_shares_is_the_token_mean_of_the_step(windows: int, slots: tuple[int, int, int]) -> None:
    accumulate, world_size, rows = slots
    sampler = EpochWindows(windows, accumulate * world_size * rows, seed=0)
    ranks = [
        list(training(sampler, 3, accumulate=accumulate, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    losses = torch.rand(windows + 3, dtype=torch.float64)  # of each target
    for step in range(sampler.steps_per_epoch):
        batches = [rank[micro] for rank in ranks for micro in range(step * accumulate, (step + 1) * accumulate)]
        shares = [losses[batch.targets[batch.targets != IGNORE]].sum() * batch.share for batch in batches]
        targets = torch.from_numpy(sampler.starts(step))[:, None] + torch.arange(1, 4)
        # the same float64 sum in another order
        torch.testing.assert_close(torch.stack(shares).mean(), losses[targets].mean(), rtol=1e-12, atol=0)


def test_batch_that_the_slots_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size is 64 .*6 equal parts.*3 x 2 devices.*multiple of 6"):
        training(EpochWindows(100, 64, seed=0), 4, accumulate=3, world_size=2)


def evaluation(length: int, *args: object, **kwargs: object) -> EvaluationBatches:
    return EvaluationBatches(np.arange(length), *args, **kwargs)  # type: ignore[arg-type]


def counted_targets(batches: EvaluationBatches) -> list[int]:
    return [target for batch in batches for target in batch.targets[batch.targets != IGNORE].tolist()]


evaluations = st.integers(1, 8).flatmap(
    lambda window: st.tuples(
        st.just(window), st.just(window) | st.integers(1, window), st.integers(window + 1, 60), st.integers(1, 9)
    )
)


@given(evaluations, st.integers(1, 4))
@property_test
def test_evaluation_counts_each_token_exactly_once_over_all_ranks(
    case: tuple[int, int, int, int], world_size: int
) -> None:
    window, stride, length, batch_size = case
    ranks = [
        evaluation(length, window, batch_size, stride, "new", rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(target for rank in ranks for target in counted_targets(rank)) == list(range(1, length))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(list(rank)) == len(rank) for rank in ranks)
    assert len({batch.inputs.shape for rank in ranks for batch in rank}) == 1


@given(evaluations)
@property_test
def test_evaluation_gives_each_counted_target_the_tokens_before_it(case: tuple[int, int, int, int]) -> None:
    window, stride, length, batch_size = case
    least = window - stride + 1  # tokens of context, except in the first window
    for batch in evaluation(length, window, batch_size, stride, "new"):
        rows, offsets = torch.nonzero(batch.targets != IGNORE, as_tuple=True)
        first = batch.inputs[rows, 0]
        for offset in range(window):
            inside = offset <= offsets
            assert (batch.inputs[rows, offset] == first + offset)[inside].all()
        assert (batch.targets[rows, offsets] == first + offsets + 1).all()
        assert ((offsets + 1 >= least) | (first == 0)).all()
        assert batch.share == 1


@given(evaluations, st.integers(1, 4))
@property_test
def test_evaluation_of_all_positions_counts_full_windows_only(case: tuple[int, int, int, int], world_size: int) -> None:
    window, stride, length, batch_size = case
    ranks = [
        evaluation(length, window, batch_size, stride, "all", rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    starts = range(0, length - window, stride)
    expected = Counter(start + 1 + offset for start in starts for offset in range(window))
    assert Counter(target for rank in ranks for target in counted_targets(rank)) == expected


def test_founding_protocol_averages_all_positions_of_all_windows() -> None:
    assert len(counted_targets(evaluation(1000, 32, 64, 1, "all"))) == (1000 - 32) * 32


def test_evaluation_is_the_same_each_time() -> None:
    batches = evaluation(50, 8, 2, 3)
    assert [batch.targets.tolist() for batch in batches] == [batch.targets.tolist() for batch in batches]


@pytest.mark.parametrize("stride", [0, 5])
def test_stride_that_skips_characters_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match=rf"data\.val_stride is {stride}.*between 1 and data\.window, 4"):
        evaluation(50, 4, 2, stride)


def test_split_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.window is 8.*at least 9 tokens.*8"):
        evaluation(8, 8, 2, 8)
