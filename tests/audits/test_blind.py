"""The blind pass and its verdict, on networks that see what they may not, each in another way."""

import pytest
import torch
import torch.nn.functional as F

from llmx.audits.blind import (
    BlindResult,
    Seen,
    beyond_rounding,
    blind_pass,
    change,
    draw_cuts,
    gain_of,
    is_leak,
    scored,
)
from llmx.audits.blind_location import locate
from llmx.audits.hidden_future import hidden_future_loss
from llmx.audits.score import Score
from llmx.mixers.hyena import Hyena
from llmx.protocol import IGNORE
from tests.audits.networks import VOCAB, Bare, CentredConvolution, NormOverRows, Part, Remembering, decoder

WINDOW, ROWS, BATCH = 12, 24, 8
TEXT = torch.randint(VOCAB, (ROWS * WINDOW + 1,), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TEXT[:-1].view(ROWS, WINDOW), TEXT[1:].clone().view(ROWS, WINDOW)


@torch.no_grad()
def passes(network, targets=TARGETS, seed=0):
    score = Score(network.eval())
    seen = Seen(INPUTS, targets, scored(score, INPUTS, targets, BATCH, "cpu"))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROWS, generator=generator)
    cuts = draw_cuts(targets, generator)[rows]
    blind = blind_pass(score, seen, rows, cuts, BATCH, "cpu")
    return score, seen, blind, change(seen, blind)


def located(network):
    return locate(*passes(network), BATCH, "cpu")


def test_cuts_stand_behind_counted_characters():
    targets = TARGETS.clone()
    targets[:, : WINDOW - 3] = IGNORE
    targets[3] = IGNORE
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_cuts(targets, generator) for _ in range(50)])
    assert not drawn[:, 3].any()
    rest = drawn[:, torch.arange(ROWS) != 3]
    assert set(rest.flatten().tolist()) == {WINDOW - 2, WINDOW - 1, WINDOW}


def test_an_honest_network_is_identical_to_the_last_bit():
    _, seen, blind, changed = passes(decoder())
    later = torch.arange(WINDOW) >= blind.cuts[:, None]
    assert not changed.losses.any()
    assert (blind.inputs != seen.inputs[blind.rows]).any(1).sum() > ROWS / 2  # something was replaced
    assert torch.equal(blind.inputs[~later], seen.inputs[blind.rows][~later])
    assert not torch.equal(blind.rows, torch.arange(ROWS))


def test_a_fourier_transform_is_within_rounding():
    score, seen, blind, changed = passes(decoder(Hyena))
    sizes = changed.losses.abs()
    gain, error = gain_of(len(changed.drawn), changed.drawn.sum().item(), changed.drawn.square().sum().item())
    assert 0 < sizes.max() < 1e-4
    assert not beyond_rounding(score.network, seen, blind, changed, torch.float32)
    assert not is_leak(gain, error, sizes.max().item(), torch.float32)


class NextToken(Bare):
    """Is sure of the token that it sees next."""

    def hidden(self, tokens):
        x, context = super().hidden(tokens)
        return 5 * F.pad(x, (0, 0, 0, 1))[:, 1:], context


def test_the_gain_is_what_the_network_owes_to_the_future():
    network = NextToken()
    _, seen, blind, changed = passes(network)
    gain, error = gain_of(len(changed.drawn), changed.drawn.sum().item(), changed.drawn.square().sum().item())
    assert is_leak(gain, error, changed.losses.abs().max().item(), torch.float32)
    drawn = seen.losses[blind.rows].gather(1, blind.cuts[:, None] - 1).mean().item()
    honest = hidden_future_loss(network, TEXT, torch.bincount(TEXT, minlength=VOCAB), WINDOW, draws=4).loss
    # 24 characters of a loss with a deviation of 2: the mean is known to 0.4
    assert drawn + gain == pytest.approx(honest, abs=1.2)


class RowAbove(Part):
    def mix(self, x):
        return x + x.roll(1, 0)


class PlaceInTheBatch(Part):
    def mix(self, x):
        return x * torch.arange(len(x))[:, None, None]


class Counting(Part):
    calls = 0

    def mix(self, x):
        self.calls += 1
        return x * self.calls


class Dropping(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("mixer", "verdict", "what", "module"),
    [
        (CentredConvolution, "LEAKING", "later text", "blocks.0.mixer.convolution (Conv1d)"),
        (RowAbove, "LEAKING", "other rows of the batch", "blocks.0.mixer (RowAbove)"),
        (NormOverRows, "LEAKING", "other rows of the batch", "blocks.0.mixer (NormOverRows)"),
        (PlaceInTheBatch, "LEAKING", "the order of the rows", "blocks.0.mixer (PlaceInTheBatch)"),
        (Counting, "LEAKING", "how often it was called", "blocks.0.mixer (Counting)"),
        (Remembering, "LEAKING", "earlier batches", "blocks.0.mixer (Remembering)"),
        (Dropping, "RANDOM", "two identical calls", "blocks.0.mixer (Dropping)"),
    ],
)
def test_the_cause_is_found_and_the_module_is_named(mixer, verdict, what, module):
    location = located(decoder(mixer))
    assert location.verdict == verdict
    assert what in location.what
    assert location.module == module


def test_a_loss_that_is_not_finite_is_no_leak():
    class Overflowing(Part):
        def mix(self, x):
            return x / (x[:, -1:] * 0)

    *_, changed = passes(decoder(Overflowing))
    assert not changed.finite


def test_the_result_is_plain_data_and_back():
    result = BlindResult("within rounding", 1.5, 2e-7, 1e-7, 2.4e-6, 100, 0.1, 0.5)
    assert str(result) == "within rounding 2e-06"
    assert result.to_dict() == {**vars(result), "said": str(result)}
    assert BlindResult.from_numbers(result.to_numbers()) == result
    leaking = BlindResult("LEAKING", 3.3, 2.31, 0.03, 9.0, 3486, 1.0, 0.5)
    assert str(leaking) == "LEAKING: 2.3 nats better when it sees"
    assert BlindResult("NOT FINITE", float("nan"), 0.0, 0.0, 0.0, 1, 1.0, 0.5).to_dict()["loss"] is None


def test_many_small_changes_are_a_leak_and_few_large_ones_too():
    single, half = torch.float32, torch.bfloat16
    assert is_leak(2e-4, 5e-5, 1e-3, single)
    assert not is_leak(2e-4, 1e-4, 1e-3, single)
    assert not is_leak(5e-5, 1e-6, 1e-3, single)
    assert is_leak(0.0, 0.0, 0.1, single)
    assert not is_leak(0.0, 0.0, 0.1, half)
    assert is_leak(0.0, 0.0, 0.6, half)
