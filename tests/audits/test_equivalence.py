"""The audit of forms finds every way in which a recurrent form can be another function than the parallel one."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from llmx.audits.equivalence import audit_equivalence, segmentations
from llmx.blocks.prenorm import PreNormBlock
from llmx.errors import UserError
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.attention import KeyValues
from llmx.protocol import Mixer, StatefulMixer

WINDOW = 12


def decoder(mixer, feed_forward=SwiGLU, depth=2) -> Decoder:
    torch.manual_seed(0)
    return Decoder(11, partial(PreNormBlock, mixer=mixer, feed_forward=feed_forward), dim=16, depth=depth)


class Honest(Attention):
    def __init__(self, site):
        super().__init__(site, heads=2)


class WrongStep(Honest):
    def step(self, x, state, context):
        output, state = super().step(x, state, context)
        return output * (1 + 1e-7), state


class ForgetsBetweenPieces(Honest):
    """Right at once and step by step, wrong where a longer piece continues."""

    def prefill(self, x, state, context):
        if context.positions[0, 0] > 0:
            state = self.init_state(x.shape[0], state.key.shape[2])
        return super().prefill(x, state, context)


class NoGradientThroughState(Honest):
    def step(self, x, state, context):
        output, state = super().step(x, state, context)
        return output, KeyValues(*(tensor.detach() for tensor in state))


class Total(NamedTuple):
    total: torch.Tensor  # (B, D)


class Mean(StatefulMixer):
    def __init__(self, site):
        super().__init__()
        self.decay = nn.Parameter(torch.full((site.dim,), 0.5))
        self.out = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        return self.prefill(x, self.init_state(len(x), 0), context)[0]

    def init_state(self, batch_size, max_length):
        return Total(self.decay.new_zeros(batch_size, len(self.decay)))

    def step(self, x, state, context):
        total = self.decay * state.total + x
        return self.out(total), Total(total)

    def prefill(self, x, state, context):
        totals = [state.total]
        for token in x.unbind(1):
            totals.append(self.decay * totals[-1] + token)
        return self.out(torch.stack(totals[1:], 1)), Total(totals[-1])


class WrongFeedForwardStep(SwiGLU):
    def step(self, x, state, context):
        output, state = super().step(x, state, context)
        return output + 1e-6, state


def test_an_honest_network_passes_and_is_left_as_it_was():
    network = decoder(Honest)
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    report = audit_equivalence(network, WINDOW)
    assert not report.failing
    assert report.skipped is None
    assert "one function" in report.summary()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("mixer", [WrongStep, ForgetsBetweenPieces, NoGradientThroughState])
def test_each_fault_is_found(mixer: type[Mixer]):
    report = audit_equivalence(decoder(mixer), WINDOW)
    assert report.failing
    assert "DIFFERENT" in report.summary()


def test_the_component_and_the_kind_of_difference_are_named():
    [found] = audit_equivalence(decoder(WrongStep), WINDOW).divergences
    assert found.component == "blocks.0.mixer (WrongStep)"
    assert found.what == "outputs"
    assert found.lengths == (1,) * WINDOW
    [found] = audit_equivalence(decoder(Honest, WrongFeedForwardStep), WINDOW).divergences
    assert found.component == "blocks.0.feed_forward (WrongFeedForwardStep)"
    [found] = audit_equivalence(decoder(NoGradientThroughState), WINDOW).divergences
    assert found.what.startswith("gradients of ")
    [found] = audit_equivalence(decoder(ForgetsBetweenPieces), WINDOW).divergences
    assert len(found.lengths) > 1
    assert max(found.lengths) > 1
    assert found.component == "blocks.0.mixer (ForgetsBetweenPieces)"


def test_a_fault_beyond_the_tokens_that_are_differentiated_is_found():
    class Forgetful(Honest):
        def step(self, x, state, context):
            output, state = super().step(x, state, context)
            return output * (context.positions < 50)[:, None], state

    [found] = audit_equivalence(decoder(Forgetful), 64).divergences
    assert found.component == "blocks.0.mixer (Forgetful)"
    assert not audit_equivalence(decoder(Forgetful), 48).failing


def test_a_state_that_is_written_in_place_is_told_from_a_wrong_one():
    class InPlace(Mean):
        def step(self, x, state, context):
            return self.out(state.total.mul_(self.decay).add_(x)), state

    assert not audit_equivalence(decoder(Mean), WINDOW).failing
    with pytest.raises(UserError, match="in place only while gradients are off"):
        audit_equivalence(decoder(InPlace), WINDOW)


def test_a_network_without_a_recurrent_form_is_skipped():
    class Plain(Mixer):
        def __init__(self, site):
            super().__init__()
            self.out = nn.Linear(site.dim, site.dim)

        def forward(self, x, context):
            return self.out(x)

    report = audit_equivalence(decoder(Plain), WINDOW)
    assert report.skipped
    assert not report.failing


@pytest.mark.parametrize("length", [1, 2, 3, 37])
def test_segmentations_cover_the_sequence(length: int):
    for cut in segmentations(length):
        assert sum(cut) == length
        assert min(cut) > 0
