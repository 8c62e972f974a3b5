"""Windows of a token array as batches: shuffled for training, in order for evaluation.

A window of T tokens at `start` has the inputs tokens[start : start + T] and the targets one token later, so L tokens
have L - T windows of stride 1. A whole batch is fetched by index, not row by row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmx.data.token_files import TokenStream
from llmx.errors import UserError
from llmx.protocol import IGNORE

ROUNDS = 8  # of the Feistel network that shuffles without storing the order


class Batch(NamedTuple):
    """One micro-batch. Its training loss is the sum of its counted losses times `share`.

    In training, share is slots / (counted targets of the whole step) with slots = accumulate * world_size. Lightning
    and DDP average over the slots, and so get the exact mean over the tokens of the step. In evaluation, share is 1.
    """

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where not counted
    share: float


def count_windows(length: int, window: int, split: str) -> int:
    """How many windows of stride 1 a split of `length` tokens has. Raises UserError if it has none."""
    if length <= window:
        raise UserError(
            f"data.window is {window}, so a split needs at least {window + 1} tokens, but the {split} split has "
            f"{length}: choose a smaller window, a larger corpus or another data.split"
        )
    return length - window


def check_stride(stride: int, window: int) -> None:
    if not 1 <= stride <= window:
        bounds = f"must lie between 1 and data.window, {window}"
        raise UserError(f"data.val_stride is {stride}, but {bounds}: a longer stride skips characters")


@dataclass(eq=False)
class WindowSampler(ABC):
    """Chooses the windows of each training step: a pure function of (seed, step)."""

    windows: int  # how many there are
    batch_size: int  # windows a step, over all devices
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.windows // self.batch_size)

    @abstractmethod
    def starts(self, step: int) -> np.ndarray:
        """Where the windows of a step start, (batch_size,) or fewer."""


@dataclass(eq=False)
class EpochWindows(WindowSampler):
    """Every window once an epoch, in a new order each epoch; an epoch's last batch may be smaller. It keeps the order,
    8 bytes a window, in memory."""

    most: ClassVar[int] = 2**24  # windows: their order takes 128 MiB; beyond, KeyedEpochWindows

    _shuffled: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False)  # the epoch, and its order

    def starts(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        return self._shuffled[1][index * self.batch_size : (index + 1) * self.batch_size]


class KeyedEpochWindows(WindowSampler):
    """Every window once an epoch, in a new order each epoch. It computes the order step by step and never holds it."""

    def starts(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.batch_size
        places = np.arange(first, min(first + self.batch_size, self.windows))
        return permuted(places, self.windows, (self.seed, epoch))


def permuted(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where the permutation of [0, size) with this key sends some indices: (N,) -> (N,) int64, with memory O(N).

    The size is at most 2**62. A key has integers that are not negative; each key gives another permutation.
    A Feistel network is a bijection of the numbers of 2w bits, whatever its round function (Luby and Rackoff, SIAM J.
    Comput. 17(2), 1988). A number outside [0, size) passes again until it falls inside, which makes a bijection of
    [0, size) (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). With the
    smallest w there are fewer than 4 * size such numbers for size > 1, so an index takes fewer than 4 passes on
    average. The round function is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): quick and thorough,
    but no cryptography.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.random.default_rng(key).integers(2**64, size=ROUNDS, dtype=np.uint64)
    image = _feistel(index.astype(np.uint64), half, keys)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], half, keys)
    return image.astype(np.int64)


def _feistel(number: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = number >> half, number & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(number: np.ndarray) -> np.ndarray:
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


class RandomWindows(WindowSampler):
    """Independent uniform windows. Every batch is full, and an epoch is only a number of steps."""

    def starts(self, step: int) -> np.ndarray:
        return np.random.default_rng((self.seed, step)).integers(self.windows, size=self.batch_size)


@dataclass(eq=False, repr=False)
class TrainingBatches:
    """One rank's micro-batches, from the current step of training to the end of that step's epoch.

    Slot m * world_size + rank of a step, for micro-batch m, is a contiguous slice of the step's windows. Every
    micro-batch has batch_size / (accumulate * world_size) rows: rows that count nothing pad a smaller global batch.
    Resuming, or another number of devices, gives the same global batches. Raises UserError if the batch cannot be cut
    into accumulate * world_size equal slices.
    """

    tokens: np.ndarray | TokenStream  # the training split, (L,), in memory or in files
    window: int  # T
    sampler: WindowSampler
    start_step: Callable[[], int]  # gives the global step to begin at, when iteration begins
    accumulate: int = 1  # micro-batches a step
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.slots = self.accumulate * self.world_size
        self.rows, rest = divmod(self.sampler.batch_size, self.slots)
        if rest:
            parts = f"trainer.accumulate_grad_batches {self.accumulate} x {self.world_size} devices"
            raise UserError(
                f"data.batch_size is {self.sampler.batch_size} windows a step over all devices, which cannot be cut "
                f"into {self.slots} equal parts ({parts}): choose a multiple of {self.slots}"
            )

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        return self.sampler.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        first, steps = self.start_step(), self.sampler.steps_per_epoch
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
        """Empty: only the step needs restoring. The method itself tells Lightning that resuming is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(eq=False, repr=False)
class EvaluationBatches:
    """A whole split in order, the same for any number of ranks, which share the rows of each batch.

    Windows start every `stride` tokens. With `count` "new" each of the L - 1 predictable tokens counts exactly once:
    the first window counts all its targets, a later one its last `stride`, and the last window is cut off at the end
    of the split. With "all" only full windows are taken and all their targets counted, so a token counts as often as
    windows cover it. All batches have the same shape; rows beyond the last window count nothing. Raises UserError if
    the stride is not in [1, window], or the split is not longer than a window.
    """

    tokens: np.ndarray | TokenStream  # the split, (L,)
    window: int  # T
    batch_size: int  # rows a batch, over all ranks; rounded up to a multiple of `world_size`
    stride: int  # if it is `window`, windows do not overlap
    count: Literal["new", "all"] = "new"
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_stride(self.stride, self.window)
        beyond_first = count_windows(len(self.tokens), self.window, "evaluated") - 1  # after the first window
        self.windows = 1 + (beyond_first // self.stride if self.count == "all" else -(-beyond_first // self.stride))
        self.rows = -(-self.batch_size // self.world_size)

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
