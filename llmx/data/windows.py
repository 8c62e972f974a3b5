"""Windows of a token array as batches: shuffled for training, in order for evaluation.

A window of T tokens at `start` has the inputs tokens[start : start + T] and the targets one token later, so L tokens
have L - T windows of stride 1. Whole batches are fetched by index; nothing is collated row by row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmx.data.permutation import permuted
from llmx.data.token_files import TokenStream
from llmx.errors import UserError
from llmx.protocol import IGNORE


class Batch(NamedTuple):
    """One micro-batch.

    inputs:   (B, T) int64
    targets:  (B, T) int64, IGNORE where not counted
    share:    the training loss of a micro-batch is the sum of its counted losses times share. With share = slots /
              (counted targets of the whole step), where slots = accumulate * world_size, the average over the slots,
              which is what Lightning and DDP take, is the exact mean over the tokens of the step. 1 in evaluation.
    """

    inputs: Tensor
    targets: Tensor
    share: float


def count_windows(length: int, window: int, split: str) -> int:
    """How many windows of stride 1 a split of `length` tokens has. Raises UserError where it has none."""
    if length <= window:
        raise UserError(
            f"data.window is {window}, so a split needs at least {window + 1} tokens, but the {split} split has "
            f"{length}: choose a smaller window, a larger corpus or another data.split"
        )
    return length - window


def check_stride(stride: int, window: int) -> None:
    if not 1 <= stride <= window:
        raise UserError(
            f"data.val_stride is {stride}, but must lie between 1 and data.window, {window}: a longer stride skips "
            "characters"
        )


class WindowSampler(ABC):
    """Which windows each training step takes: a pure function of (seed, step)."""

    def __init__(self, windows: int, batch_size: int, seed: int):
        """`windows`: how many there are; `batch_size`: windows a step, over all devices."""
        self.windows = windows
        self.batch_size = batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.windows // self.batch_size)

    @abstractmethod
    def starts(self, step: int) -> np.ndarray:
        """Where the windows of a step start, (batch_size,) or fewer."""


class EpochWindows(WindowSampler):
    """Every window once an epoch, in a new order each epoch; an epoch's last batch may be smaller. The order is held:
    8 bytes a window."""

    most = 2**24  # windows, of which the order takes 128 MiB; beyond, KeyedEpochWindows

    def __init__(self, windows: int, batch_size: int, seed: int):
        super().__init__(windows, batch_size, seed)
        self._shuffled: tuple[int, np.ndarray] | None = None  # the epoch, and its order

    def starts(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        return self._shuffled[1][index * self.batch_size : (index + 1) * self.batch_size]


class KeyedEpochWindows(WindowSampler):
    """Every window once an epoch, in a new order each epoch, which is computed for a step at a time and never held."""

    def starts(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.batch_size
        places = np.arange(first, min(first + self.batch_size, self.windows))
        return permuted(places, self.windows, (self.seed, epoch))


class RandomWindows(WindowSampler):
    """Independent uniform windows; every batch is full, and an epoch only a number of steps."""

    def starts(self, step: int) -> np.ndarray:
        return np.random.default_rng((self.seed, step)).integers(self.windows, size=self.batch_size)


class TrainingBatches:
    """One rank's micro-batches, from the step that training is at to the end of that step's epoch.

    Slot m * world_size + rank of a step, for micro-batch m, is a contiguous slice of the step's windows. Every
    micro-batch has batch_size / (accumulate * world_size) rows: a smaller global batch is padded with rows that count
    nothing. Resuming, or another number of devices, gives the same global batches.

    Args:
        tokens: The training split, (L,), in memory or in files.
        window: Tokens a window, T.
        sampler: Chooses the windows of each step.
        start_step: The global step to begin at, asked when iteration begins.
        accumulate: Micro-batches a step.
        rank: This process, of `world_size`.

    Raises:
        UserError: The batch cannot be cut into accumulate * world_size equal slices.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenStream,
        window: int,
        sampler: WindowSampler,
        start_step: Callable[[], int],
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.slots = accumulate * world_size
        self.rows, rest = divmod(sampler.batch_size, self.slots)
        if rest:
            raise UserError(
                f"data.batch_size is {sampler.batch_size} windows a step over all devices, which cannot be cut into "
                f"{self.slots} equal parts (trainer.accumulate_grad_batches {accumulate} x {world_size} devices): "
                f"choose a multiple of {self.slots}"
            )
        self.tokens = tokens
        self.window = window
        self.sampler = sampler
        self.start_step = start_step
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        return self.sampler.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        first = self.start_step()
        steps = self.sampler.steps_per_epoch
        for step in range(first, (first // steps + 1) * steps):
            starts = self.sampler.starts(step)
            share = self.slots / (len(starts) * self.window)
            for micro in range(self.accumulate):
                slot = micro * self.world_size + self.rank
                yield self._batch(starts[slot * self.rows : (slot + 1) * self.rows], share)

    def _batch(self, starts: np.ndarray, share: float) -> Batch:
        positions = starts[:, None] + np.arange(self.window + 1)
        rows = torch.from_numpy(self.tokens.take(positions, mode="clip").astype(np.int64))  # (B, T + 1)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if missing := self.rows - len(starts):
            inputs = torch.cat([inputs, inputs.new_zeros(missing, inputs.shape[1])])
            targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORE)])
        return Batch(inputs, targets, share)

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is nothing to restore but the step. Having one tells Lightning that resuming is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EvaluationBatches:
    """A whole split in order, the same for any number of ranks, which share out the rows of each batch.

    Windows start every `stride` tokens. With `count` "new" each of the L - 1 predictable tokens is counted exactly
    once: the first window counts all its targets, a later one its last `stride`, and the last window is cut off where
    the split ends. With "all" only full windows are taken and all their targets counted, so a token counts as often
    as windows cover it. All batches have the same shape; rows beyond the last window count nothing.

    Args:
        tokens: The split, (L,), at least window + 1 of them.
        window: Tokens a window, T.
        batch_size: Rows a batch, over all ranks; rounded up to a multiple of `world_size`.
        stride: Tokens from one window to the next; None for `window`, windows that do not overlap.
        count: Which targets of overlapping windows are counted.
        rank: This process, of `world_size`.

    Raises:
        UserError: The stride is not in [1, window], or the split is shorter than a window.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenStream,
        window: int,
        batch_size: int,
        stride: int | None = None,
        count: Literal["new", "all"] = "new",
        rank: int = 0,
        world_size: int = 1,
    ):
        self.stride = window if stride is None else stride
        check_stride(self.stride, window)
        beyond_first = count_windows(len(tokens), window, "evaluated") - 1  # targets that the first window lacks
        self.windows = 1 + (beyond_first // self.stride if count == "all" else -(-beyond_first // self.stride))
        self.tokens = tokens
        self.window = window
        self.count = count
        self.rows = -(-batch_size // world_size)
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.windows // (self.rows * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        offsets = np.arange(self.window)
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.rows
            number = np.arange(first, first + self.rows)[:, None]  # (B, 1): which window of the split
            positions = number * self.stride + offsets  # (B, T): of the inputs; a target stands one further
            counted = (number < self.windows) & (positions < len(self.tokens) - 1)
            if self.count == "new":
                counted &= (number == 0) | (offsets >= self.window - self.stride)
            inputs = self.tokens.take(positions, mode="clip").astype(np.int64)
            targets = np.where(counted, self.tokens.take(positions + 1, mode="clip").astype(np.int64), IGNORE)
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(targets), 1.0)
