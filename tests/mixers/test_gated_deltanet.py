"""Gated DeltaNet: the paper's equations a token at a time, eigenvalues, and gates that close."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.gated_deltanet import GatedDeltaNet
from llmx.protocol import Site
from tests.delta import assert_is_the_paper, convolved, naive, normed, unit
from tests.parity import context

DIM, TIME = 12, 37


def paper(mixer: GatedDeltaNet, x: Tensor) -> tuple[Tensor, Tensor]:
    u, gate, rate, decay = mixer.project(x).split(mixer.widths, -1)
    query, key, value = convolved(u, mixer.convolution.taps).split(mixer.convolved, -1)
    shared = mixer.heads // mixer.key_heads
    query, key = (unit(y.unflatten(-1, (mixer.key_heads, -1))).repeat_interleave(shared, 2) for y in (query, key))
    alpha = torch.exp(-torch.exp(mixer.decay_log) * torch.log1p(torch.exp(decay + mixer.decay_bias)))
    outputs, memory = naive(
        query / mixer.key_dim**0.5,
        key,
        value.unflatten(-1, (mixer.heads, -1)),
        mixer.beta_max * torch.sigmoid(rate),
        alpha.log()[..., None].expand_as(key),
        x.new_zeros(len(x), mixer.heads, mixer.key_dim, mixer.value_dim),
    )
    return mixer.out(normed(outputs, mixer.norm).flatten(2) * F.silu(gate)), memory


@pytest.mark.parametrize("arguments", [{"heads": 3}, {"heads": 4, "key_heads": 2, "value_dim": 5, "beta_max": 2.0}])
def test_outputs_memory_and_gradients_are_those_of_the_paper(arguments):
    assert_is_the_paper(GatedDeltaNet(Site(DIM), **arguments), paper, DIM, TIME)


@torch.no_grad()
def test_only_a_rate_above_one_reaches_a_negative_eigenvalue():
    """A token written again with the rate of 2 and the value 0 turns what its key holds around."""
    for beta_max, eigenvalue in ((1.0, 0.0), (2.0, -1.0)):
        mixer = GatedDeltaNet(Site(4), heads=1, convolution=1, beta_max=beta_max).double()
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.convolution.taps.fill_(1.0)
        mixer.project.weight[4:8] = torch.eye(4)  # the key is the token
        mixer.project.weight[16, 3] = 50.0  # and the rate is at its highest
        mixer.decay_log.fill_(-100.0)  # nothing fades
        state = mixer.init_state(1, 1)
        held = torch.randn(1, 1, 4, 4, dtype=torch.float64)
        x = torch.tensor([[0.0, 0, 0, 5]], dtype=torch.float64)
        after = mixer.step(x, state._replace(memory=held), context(x[:, None]).at(0))[1].memory
        assert_close(after[..., 3, :], eigenvalue * held[..., 3, :], rtol=1e-6, atol=1e-6)
        assert_close(after[..., :3, :], held[..., :3, :])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gate_that_leaves_nothing_keeps_outputs_and_gradients_finite(autocast: bool):
    mixer = GatedDeltaNet(Site(DIM), heads=3)
    torch.nn.init.constant_(mixer.decay_bias, 1e4)
    x = torch.randn(2, 80, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs, state = mixer.prefill(x, mixer.init_state(2, 80), context(x))
    assert state.memory.dtype == torch.float32
    gradients = torch.autograd.grad(outputs.float().sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (outputs, state.memory, *gradients))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("heads", {"heads": 5}),
        ("key_heads", {"key_heads": 3}),
        ("key_dim", {"key_dim": 0}),
        ("value_dim", {"value_dim": 0}),
        ("beta_max", {"beta_max": 2.5}),
        ("beta_max", {"beta_max": 0.0}),
    ],
)
def test_sizes_that_do_not_work_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        GatedDeltaNet(Site(DIM), **arguments)
