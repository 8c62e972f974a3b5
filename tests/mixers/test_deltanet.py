"""DeltaNet: the paper's equation a token at a time, and what a rate above one can and the others cannot follow."""

import pytest
import torch
from torch import Tensor

from llmx.mixers.deltanet import DeltaNet
from llmx.protocol import Site
from tests.delta import assert_is_the_paper, convolved, naive, normed, unit
from tests.parity import context

DIM, TIME = 12, 37
BEGIN, ZERO, ONE = 0, 1, 2


def paper(mixer: DeltaNet, x: Tensor) -> tuple[Tensor, Tensor]:
    u, rate = mixer.project(x).split(mixer.widths, -1)
    convolved_heads = (y.unflatten(-1, (mixer.heads, -1)) for y in convolved(u, mixer.convolution.taps).chunk(3, -1))
    query, key, value = convolved_heads
    beta = mixer.beta_max * torch.sigmoid(rate)
    memory = x.new_zeros(len(x), mixer.heads, mixer.head_dim, mixer.head_dim)
    scale = mixer.head_dim**-0.5
    outputs, memory = naive(scale * unit(query), unit(key), value, beta, torch.zeros_like(key), memory)
    return mixer.out(normed(outputs, mixer.norm).flatten(2)), memory


@pytest.mark.parametrize(("heads", "beta_max"), [(3, 1.0), (2, 2.0)])
def test_outputs_memory_and_gradients_are_those_of_the_paper(heads: int, beta_max: float):
    assert_is_the_paper(DeltaNet(Site(DIM), heads, beta_max=beta_max), paper, DIM, TIME)


def flipper(beta_max: float) -> DeltaNet:
    """Tokens are one-hot vectors. All have one key; BEGIN writes 1 there, ONE has the highest rate and ZERO none."""
    mixer = DeltaNet(Site(4), heads=1, convolution=1, beta_max=beta_max).double()
    with torch.no_grad():
        for parameter in (mixer.project.weight, mixer.out.weight):
            parameter.zero_()
        mixer.convolution.taps.fill_(1.0)
        query, key, value, rate = mixer.project.weight.split((4, 4, 4, 1))
        query[0], key[0] = 100.0, 100.0
        value[0, BEGIN] = 1.0
        rate[0, BEGIN], rate[0, ZERO], rate[0, ONE] = 100.0, -100.0, 100.0
        mixer.out.weight[0, 0] = 1.0
    return mixer


@torch.no_grad()
def test_with_rates_up_to_two_one_head_follows_the_parity_of_bits_and_with_rates_up_to_one_it_forgets():
    torch.manual_seed(0)
    bits = torch.randint(2, (3, 500))
    tokens = torch.cat((torch.full((3, 1), BEGIN), bits + ZERO), 1)
    x = torch.eye(4, dtype=torch.float64)[tokens]
    parity = 1.0 - 2 * (bits.cumsum(1) % 2)
    mixer = flipper(2.0)
    assert torch.equal(mixer(x, context(x))[:, 1:, 0].sign(), parity.double())
    mixer = flipper(1.0)
    assert mixer(x, context(x))[:, 20:].abs().max() < 1e-6


@torch.no_grad()
def test_a_long_text_leaves_the_memory_bounded():
    mixer = DeltaNet(Site(DIM), heads=3, beta_max=2.0)
    torch.nn.init.normal_(mixer.project.weight)  # large keys: as they are, the transition would grow by their square
    x = torch.randn(1, 3000, DIM)
    memory = mixer.prefill(x, mixer.init_state(1, 3000), context(x))[1].memory
    assert memory.isfinite().all()
    assert memory.abs().max() < 1000


@pytest.mark.parametrize(("name", "arguments"), [("heads", {"heads": 5}), ("beta_max", {"beta_max": 2.5})])
def test_arguments_that_do_not_work_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        DeltaNet(Site(DIM), **arguments)
