"""Branches with a learned size."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.blocks.scaled import LayerScaleBlock, ReZeroBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.parts.norm import RMSNorm
from llmx.protocol import Context, Site

DIM, SAME = 16, {"rtol": 1e-12, "atol": 1e-12}
PARTS = {"mixer": partial(Attention, heads=4), "feed_forward": partial(SwiGLU, hidden=12)}


def given():
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    return x, Context(torch.zeros(2, 5, dtype=torch.int64), torch.arange(5)[None], x)


def moved(block):
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def test_layer_scale_is_its_equation():
    block = moved(LayerScaleBlock(Site(dim=DIM), **PARTS).double())
    x, context = given()
    y = x + block.mixer(block.mixer_norm(x), context) @ torch.diag(block.mixer_gain)
    y = y + block.feed_forward(block.feed_forward_norm(y), context) @ torch.diag(block.feed_forward_gain)
    assert_close(block(x, context), y, **SAME)


@pytest.mark.parametrize("start", [0.1, 1e-5])
def test_layer_scale_starts_with_every_channel_at_one_size(start):
    block = LayerScaleBlock(Site(dim=DIM), **PARTS, start=start)
    for gain in (block.mixer_gain, block.feed_forward_gain):
        assert_close(gain.data, torch.full((DIM,), start))


def test_rezero_is_its_equation_and_has_no_norm():
    block = moved(ReZeroBlock(Site(dim=DIM), **PARTS).double())
    x, context = given()
    y = x + block.mixer_gain.item() * block.mixer(x, context)
    y = y + block.feed_forward_gain.item() * block.feed_forward(y, context)
    assert_close(block(x, context), y, **SAME)
    assert not any(isinstance(module, RMSNorm) for module in block.modules())


def test_rezero_starts_as_the_identity_and_its_branches_learn_once_the_gains_have_moved():
    block = ReZeroBlock(Site(dim=DIM), **PARTS).double()
    x, context = given()
    output = block(x, context)
    assert torch.equal(output, x)
    output.pow(3).sum().backward()
    assert not block.mixer.qkv.weight.grad.any()
    for gain in (block.mixer_gain, block.feed_forward_gain):
        assert gain.grad != 0
        gain.data -= 0.1 * gain.grad.sign()
    block(x, given()[1]).pow(3).sum().backward()
    assert block.mixer.qkv.weight.grad.any()
    assert block.feed_forward.down.weight.grad.any()
