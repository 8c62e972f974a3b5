"""The audit of parameters: dead weight, and a start far from chance."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from llmx.audits.parameters import audit_parameters
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder


def decoder(feed_forward=SwiGLU) -> Decoder:
    torch.manual_seed(0)
    block = partial(PreNormBlock, mixer=partial(Attention, heads=2), feed_forward=feed_forward)
    return Decoder(11, block, dim=16, depth=2)


class Unused(SwiGLU):
    def __init__(self, site):
        super().__init__(site)
        self.forgotten = nn.Parameter(torch.ones(3))


class Multiplied(SwiGLU):
    """Has a gradient, of zeros."""

    def __init__(self, site):
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, context):
        return super().forward(x, context) + 0 * self.gain


class ZeroProjection(SwiGLU):
    def __init__(self, site):
        super().__init__(site)
        nn.init.zeros_(self.down.weight)


def test_an_honest_network_passes():
    report = audit_parameters(decoder(), 12)
    assert not report.failing
    assert report.silent == ()
    assert report.initial_loss == pytest.approx(math.log(11), abs=0.2)


def test_a_projection_that_starts_at_zero_hides_nothing():
    assert not audit_parameters(decoder(ZeroProjection), 12).failing


@pytest.mark.parametrize(("cls", "name"), [(Unused, "forgotten"), (Multiplied, "gain")])
def test_a_parameter_without_a_gradient_is_named(cls, name):
    report = audit_parameters(decoder(cls), 12)
    assert report.silent == (f"blocks.0.feed_forward.{name}", f"blocks.1.feed_forward.{name}")
    assert f"blocks.0.feed_forward.{name}" in report.summary()


def test_a_frozen_parameter_is_not_dead():
    network = decoder(Unused)
    for block in network.layers:
        block.feed_forward.forgotten.requires_grad_(False)
    assert not audit_parameters(network, 12).failing


def test_a_loss_that_starts_far_above_chance_is_said():
    network = decoder()
    with torch.no_grad():
        network.head.linear.weight.mul_(200)
    report = audit_parameters(network, 12)
    assert report.failing
    assert "TOO HIGH" in report.summary()


def test_the_network_is_left_as_it_was():
    network = decoder()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    audit_parameters(network, 12)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
