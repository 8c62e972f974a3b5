"""Kimi Delta Attention: the paper's equation a token at a time, and gates that close."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.kda import KDA
from llmx.protocol import Site
from tests.delta import assert_is_the_paper, convolved, naive, normed, unit
from tests.parity import context, randomised

DIM, TIME = 12, 37


def paper(mixer: KDA, x: Tensor) -> tuple[Tensor, Tensor]:
    u, few_decay, few_gate, rate = mixer.project(x).split(mixer.widths, -1)
    query, key, value = (y.unflatten(-1, (mixer.heads, -1)) for y in convolved(u, mixer.convolution.taps).chunk(3, -1))
    softplus = torch.log1p(torch.exp(mixer.decay_up(few_decay) + mixer.decay_bias)).view_as(key)
    outputs, memory = naive(
        unit(query) / mixer.head_dim**0.5,
        unit(key),
        value,
        mixer.beta_max * torch.sigmoid(rate),
        -torch.exp(mixer.decay_log)[:, None] * softplus,
        x.new_zeros(len(x), mixer.heads, mixer.head_dim, mixer.head_dim),
    )
    return mixer.out(normed(outputs, mixer.norm).flatten(2) * torch.sigmoid(mixer.gate_up(few_gate))), memory


@pytest.mark.parametrize("arguments", [{"heads": 3}, {"heads": 2, "rank": 5, "beta_max": 2.0}])
def test_outputs_memory_and_gradients_are_those_of_the_paper(arguments):
    assert_is_the_paper(KDA(Site(DIM), **arguments), paper, DIM, TIME)


@torch.no_grad()
def test_a_channel_that_forgets_has_forgotten_before_the_key_takes_out_what_it_holds():
    """Written by hand: what is removed is read from the channels that are left."""
    mixer = randomised(KDA(Site(DIM), heads=1)).double()
    mixer.decay_bias.fill_(-100.0)
    mixer.decay_bias[0] = 1e5  # channel 0 keeps nothing, the others everything
    x = torch.randn(1, DIM, dtype=torch.float64)
    state = mixer.init_state(1, 1)
    held = torch.randn_like(state.memory)
    after = mixer.step(x, state._replace(memory=held), context(x[:, None]).at(0))[1].memory[0, 0]
    u, _, _, rate = mixer.project(x)[0].split(mixer.widths)
    _, key, value = torch.nn.functional.silu(u * mixer.convolution.taps[-1]).chunk(3)
    key, beta, left = key / key.norm(), torch.sigmoid(rate), held[0, 0].clone()
    left[0] = 0
    assert_close(after, left + beta * torch.outer(key, value - key @ left), rtol=1e-3, atol=1e-3)
    wrong = left + beta * torch.outer(key, value - key @ held[0, 0])
    assert (after - wrong).abs().max() > 0.01


@pytest.mark.parametrize("size", [1e4, 1e-12])
@pytest.mark.parametrize("autocast", [False, True])
def test_closed_and_open_gates_leave_outputs_and_gradients_finite(size: float, autocast: bool):
    mixer = KDA(Site(DIM), heads=3)
    torch.nn.init.constant_(mixer.decay_log, torch.tensor(size).log().item())
    x = torch.randn(2, 80, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs, state = mixer.prefill(x, mixer.init_state(2, 80), context(x))
    assert state.memory.dtype == torch.float32
    gradients = torch.autograd.grad(outputs.float().sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (outputs, state.memory, *gradients))


@pytest.mark.parametrize(
    ("name", "arguments"), [("heads", {"heads": 5}), ("rank", {"rank": 0}), ("beta_max", {"beta_max": 2.5})]
)
def test_arguments_that_do_not_work_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        KDA(Site(DIM), **arguments)
