"""The blind pass: a split is scored a second time, and no prediction can see what it may not see.

In each row of a batch one counted character is drawn. The text from that character on becomes other text: characters
drawn from the split, which know nothing of it. The rows form other batches in another order. Precision, device,
compilation and the shape of a batch stay those of the run. The losses up to the drawn character must not change:

    gain = mean over rows of (blind loss - loss) of the drawn character     by how much the network is better if it sees

Rows of one shape round alike, so most networks are compared exactly. Fourier transforms and experts are exceptions: an
expert's matrix product is as long as its number of tokens. There the change is rounding unless one of these holds:

    a copy in float64 changes too, on the row that changed most
    the gain is above three standard errors and 1e-4 nats
    the loss of one character changes by more than 0.5 nats in 16 bits, or 0.05 in more (a router's choice may turn)
    a tenth of the characters of a row change by more than the precision explains
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmx.audits.network_copies import exact_copy, preserve_rng_state, seed_cpu
from llmx.audits.rounding import CAST_TOLERANCE, MIN_LOG_PROBABILITY, RoundingWatch, relative_change
from llmx.audits.score import Score
from llmx.protocol import IGNORE, Losses, Network, Tokens

VERDICTS = ("identical", "within rounding", "LEAKING", "RANDOM", "NOT FINITE")
LEAST_GAIN = 1e-4  # nats
ERRORS = 3  # standard errors
LARGEST = {torch.float16: 0.5, torch.bfloat16: 0.5}  # nats, by the precision of the logits
LARGEST_IN_32_BITS = 0.05  # nats
TOLERANCE = 1e-5  # relative to the largest loss: smaller changes are not looked at again
EXACT_TOLERANCE = 1e-7  # in float64, where Fourier transforms leave 1e-15, and casts to float32 3e-8 of a loss
MANY = 0.1  # of the positions before the cut


class Seen(NamedTuple):
    """The rows of a split as they were scored the first time."""

    inputs: Tokens  # (N, T)
    targets: Tokens  # (N, T)
    losses: Losses  # (N, T)


class Blind(NamedTuple):
    """Rows that were scored again."""

    rows: Tensor  # (M,) their numbers in Seen, in the order of the blind batches
    cuts: Tensor  # (M,) where other text begins; 0 where a row counts nothing
    inputs: Tokens  # (M, T) with the other text
    losses: Losses  # (M, T) of the true targets


class Change(NamedTuple):
    """What the second pass changed."""

    losses: Tensor  # (M, T) blind minus seen, in nats; 0 from the cut on and where nothing is counted
    drawn: Tensor  # (M',) of the drawn characters
    finite: bool


@dataclass(frozen=True)
class BlindResult:
    """The verdict on a split. `share` is the part of it that was scored twice."""

    verdict: str  # one of VERDICTS
    loss: float  # nats a token of the whole split, for a network that cannot see
    gain: float  # nats
    error: float  # standard error of the gain
    largest: float  # nats, the largest change of one loss
    characters: int  # drawn
    share: float
    seconds: float

    def __str__(self) -> str:
        if self.verdict == "LEAKING":
            if self.gain > ERRORS * self.error:
                return f"LEAKING: {self.gain:.2g} nats better when it sees"
            return f"LEAKING: losses change by up to {self.largest:.2g} nats when it does not see"
        return f"{self.verdict} {self.largest:.0e}" if self.verdict == "within rounding" else self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a run's record, null for what is not finite; `said` is the sentence for people."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return plain | {"said": str(self)}

    def to_numbers(self) -> dict[str, float]:
        """The result as numbers, which reach the process that started others."""
        return {key: float(value) for key, value in (vars(self) | {"verdict": VERDICTS.index(self.verdict)}).items()}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> BlindResult:
        verdict, characters = VERDICTS[int(numbers["verdict"])], int(numbers["characters"])
        values: dict[str, Any] = {**numbers, "verdict": verdict, "characters": characters}
        return cls(**values)


def draw_cuts(targets: Tokens, generator: torch.Generator) -> Tensor:
    """(N, T) -> (N,): one position behind a counted one, drawn for each row; 0 where none is counted."""
    counted = targets != IGNORE
    lots = torch.rand(targets.shape, generator=generator).masked_fill(~counted, -1)
    return torch.where(counted.any(1), lots.argmax(1) + 1, 0)


def blind_pass(score: Score, seen: Seen, rows: Tensor, cuts: Tensor, batch_size: int, device: Any) -> Blind:
    """Scores `rows` (M,) of a split again, in batches of `batch_size` rows; M is a multiple of it.

    Tensors of `seen` are on the CPU, `cuts` (M,) are those of `rows`.
    """
    own, text = seen.inputs[rows], seen.inputs.flatten()
    other = text[torch.randint(len(text), own.shape, generator=torch.Generator().manual_seed(len(rows)))]
    inputs = torch.where(torch.arange(own.shape[1]) >= cuts[:, None], other, own)
    return Blind(rows, cuts, inputs, scored(score, inputs, seen.targets[rows], batch_size, device))


def scored(score: Score, inputs: Tokens, targets: Tokens, batch_size: int, device: Any) -> Losses:
    """The losses of rows (N, T), scored batch by batch, on the CPU."""
    batches = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    return torch.cat([score(tokens.to(device), answers.to(device)).cpu() for tokens, answers in batches])


def change(seen: Seen, blind: Blind) -> Change:
    targets, first = seen.targets[blind.rows], seen.losses[blind.rows].double()
    before = (torch.arange(targets.shape[1]) < blind.cuts[:, None]) & (targets != IGNORE)
    second = blind.losses.double()
    difference = torch.where(before & (first != second), second - first, 0)
    drawn = blind.cuts > 0
    at = difference[drawn].gather(1, blind.cuts[drawn, None] - 1)[:, 0]
    finite = bool((first.isfinite() & second.isfinite())[before].all())
    return Change(difference, at, finite)


def beyond_rounding(network: Network, seen: Seen, blind: Blind, changed: Change, precision: torch.dtype) -> bool:
    """Whether a copy in float64 changes on the row that changed most, or many characters of a row change by much."""
    sizes = changed.losses.abs()
    scale = max(1.0, seen.losses[blind.rows].abs().max().item())
    row = int(sizes.amax(1).argmax())
    if sizes[row].max() <= TOLERANCE * scale:
        return False
    before = int(blind.cuts[row])
    if ((sizes > CAST_TOLERANCE.get(precision, TOLERANCE) * scale).sum(1) > MANY * blind.cuts).any():
        return True
    exact, number = exact_copy(network).eval(), int(blind.rows[row])
    targets = seen.targets[number, None]
    with preserve_rng_state(), RoundingWatch() as rounding:
        seed_cpu(0)
        first = _exact_losses(exact, seen.inputs[number, None], targets)
        seed_cpu(0)
        second = _exact_losses(exact, blind.inputs[row, None], targets)
    return bool(relative_change(first, second)[0, :before].max() > max(EXACT_TOLERANCE, rounding.tolerance))


def _exact_losses(network: Network, tokens: Tokens, targets: Tokens) -> Tensor:
    log_probabilities = network(tokens.clone()).double().log_softmax(-1)
    counted = targets != IGNORE
    losses = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return losses.clamp(max=-MIN_LOG_PROBABILITY).masked_fill(~counted, 0)


def gain_of(count: float, total: float, squares: float) -> tuple[float, float]:
    """The mean of `count` changes and its standard error, from their sum and their sum of squares."""
    mean = total / max(count, 1)
    variance = max(squares / max(count, 1) - mean**2, 0.0) * count / max(count - 1, 1)
    return mean, math.sqrt(variance / max(count, 1))


def is_leak(gain: float, error: float, largest: float, precision: torch.dtype) -> bool:
    """Whether losses change by more than the rounding of a network that is not bitwise stable."""
    return abs(gain) > max(LEAST_GAIN, ERRORS * error) or largest > LARGEST.get(precision, LARGEST_IN_32_BITS)
