"""The audit of a network as it runs: leaks that a copy in float64 at shorter lengths does not have."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmx.audits.causality import audit_causality
from llmx.audits.live_run import audit_live_run
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.moe import MixtureOfExperts
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.mixers.hyena import Hyena
from llmx.networks.decoder import Decoder
from llmx.protocol import Mixer, Site

VOCAB, WINDOW = 7, 48
TEXT = torch.randint(VOCAB, (3000,), generator=torch.Generator().manual_seed(0))
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


SWIGLU = partial(SwiGLU, hidden=16)


def network(mixer, feed_forward=SWIGLU) -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCAB, partial(PreNormBlock, mixer=mixer, feed_forward=feed_forward), dim=16, depth=2)


class Part(Mixer):
    def __init__(self, site: Site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        return self.mix(self.linear(x))


class Peeking(Part):
    def mix(self, x):
        return x + F.pad(x, (0, 0, 0, 1))[:, 1:]


class PeekingInHalf(Peeking):
    """A kernel for 16 bits in which a mask was forgotten."""

    def mix(self, x):
        return super().mix(x) if x.dtype == torch.bfloat16 else x


class LookingBackFromFar(Part):
    """Its chunks are as long as a whole window, but for the last places."""

    def mix(self, x):
        return torch.cat((x[:, :40], x[:, 40:] + x[:, 40:].mean(1, keepdim=True)), 1)


class Opening(Part):
    """Training opens it."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("steps", torch.zeros(()))

    def after_optimizer_step(self):
        self.steps += 1

    def mix(self, x):
        self.last = x  # with its history
        return x + F.pad(x, (0, 0, 0, 1))[:, 1:] * (self.steps > 3)


def test_a_branch_for_16_bits_is_looked_at_in_16_bits():
    leaking = network(PeekingInHalf)
    assert not audit_causality(leaking, WINDOW).leaking
    assert audit_live_run(leaking, WINDOW, nullcontext(), TEXT, perturb=True) is None
    breach = audit_live_run(leaking, WINDOW, BF16(), TEXT, perturb=True)
    assert breach.check == "run"
    assert breach.position < breach.changed
    assert "in the run's own precision" in str(breach)


def test_what_only_the_whole_window_shows_is_found():
    assert audit_live_run(network(LookingBackFromFar), WINDOW, nullcontext(), TEXT) is not None
    assert audit_live_run(network(LookingBackFromFar), 40, nullcontext(), TEXT) is None


def test_what_training_has_opened_is_found():
    leaking = network(Opening)
    assert not audit_causality(leaking, WINDOW).leaking
    assert audit_live_run(leaking, WINDOW, nullcontext(), TEXT) is None
    leaking.losses(TEXT[None, :8], TEXT[None, 1:9])
    for _ in range(4):
        leaking.after_optimizer_step()
    assert audit_live_run(leaking, WINDOW, nullcontext(), TEXT) is not None


@pytest.mark.parametrize("autocast", [nullcontext, BF16])
@pytest.mark.parametrize(
    "honest",
    [
        partial(network, partial(Attention, heads=2)),
        partial(network, partial(Hyena, max_length=WINDOW)),  # all numbers are in the rounding of each
        partial(
            network, partial(Attention, heads=2), partial(MixtureOfExperts, hidden=8, experts=4)
        ),  # lengths of products depend on all
    ],
)
def test_rounding_is_no_leak(honest, autocast):
    for seed in range(5):
        assert audit_live_run(honest(), WINDOW, autocast(), TEXT, perturb=True, seed=seed) is None


def test_the_network_stays_as_it_was():
    trained = network(Opening).train()
    trained.losses(TEXT[None, :8], TEXT[None, 1:9])
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    draw = torch.random.get_rng_state()
    last = trained.blocks[0].mixer.last
    audit_live_run(trained, WINDOW, nullcontext(), TEXT, perturb=True)
    assert trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(draw, torch.random.get_rng_state())
    assert trained.blocks[0].mixer.last is last


def test_it_needs_no_text_and_a_future():
    assert audit_live_run(network(Peeking), WINDOW, nullcontext()) is not None
    assert audit_live_run(network(Peeking), 1, nullcontext()) is None
