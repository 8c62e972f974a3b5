"""The gated short convolution: its equation, and how far a stack of them sees."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.short_convolution import GatedShortConvolution
from llmx.networks.decoder import Decoder
from llmx.protocol import Context, Site
from tests.forms import perturbed


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


@pytest.mark.parametrize("width", [1, 3])
def test_outputs_are_the_equation(width: int):
    mixer = perturbed(GatedShortConvolution(Site(dim=6), width))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    output = mixer(x, context(x))
    gate, value = (x @ matrix.T for matrix in mixer.gate_value.weight.chunk(2))
    impulse = torch.eye(width, dtype=torch.float64)[:1].T[None].expand(1, width, 6)  # a 1, then zeros
    taps = mixer.convolution(impulse)[0]  # c_0, c_1, ...
    for t in range(7):
        mixed = sum(taps[j] * value[:, t - j] for j in range(min(width, t + 1)))
        assert_close(output[:, t], (F.silu(gate[:, t]) * mixed) @ mixer.out.weight.T)


@torch.no_grad()
def test_a_stack_sees_as_far_as_its_layers_reach_together():
    block = partial(PreNormBlock, mixer=partial(GatedShortConvolution, width=3), feed_forward=SwiGLU)
    network = perturbed(Decoder(5, block, dim=8, depth=2))
    tokens = torch.randint(5, (1, 12))
    moved = tokens.clone()
    moved[0, 4] = (moved[0, 4] + 1) % 5
    change = (network(moved) - network(tokens)).abs().amax((0, 2))
    assert [t for t in range(12) if change[t] > 1e-12] == [4, 5, 6, 7, 8]
