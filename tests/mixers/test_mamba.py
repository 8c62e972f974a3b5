"""Mamba against the MambaMixer of transformers, and its traps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.mixers.mamba import Mamba
from llmx.protocol import Site
from tests.parity import Named, assert_same_mixer, context, randomised, values

reference = pytest.importorskip("transformers.models.mamba.modeling_mamba")
config = pytest.importorskip("transformers.models.mamba.configuration_mamba")

SHAPES = [(1, 1, 8, 4, 4), (2, 7, 8, 16, 4), (3, 21, 20, 3, 3)]  # batch, time, dim, state, convolution


def as_mamba(mixer: Mamba, tensors: Named) -> Named:
    return {
        "A_log": tensors["decay_log"],
        "D": tensors["skip"],
        "in_proj.weight": tensors["project.weight"],
        "conv1d.weight": tensors["convolution.taps"].t()[:, None],
        "conv1d.bias": tensors["convolution.bias"],
        "x_proj.weight": tensors["select.weight"],
        "dt_proj.weight": tensors["step_size.weight"],
        "dt_proj.bias": tensors["step_size.bias"],
        "out_proj.weight": tensors["out.weight"],
    }


@pytest.mark.parametrize(("batch", "time", "dim", "state", "convolution"), SHAPES)
def test_outputs_and_gradients_are_those_of_mamba(batch, time, dim, state, convolution):
    ours = randomised(Mamba(Site(dim=dim), state=state, convolution=convolution), 0.3)
    theirs: nn.Module = reference.MambaMixer(
        config.MambaConfig(hidden_size=dim, state_size=state, conv_kernel=convolution, use_mambapy=False), 0
    )
    theirs.load_state_dict(as_mamba(ours, values(ours)))
    assert_same_mixer(ours, theirs, theirs, as_mamba, batch, time, dim)


def test_a_step_needs_what_the_convolution_has_seen():
    torch.manual_seed(0)
    mixer = Mamba(Site(dim=8))
    x = torch.randn(2, 9, 8)
    whole, here = mixer(x, context(x)), context(x)
    _, state = mixer.prefill(x[:, :6], mixer.init_state(2, 9), context(x[:, :6]))
    forgotten = state._replace(convolution=torch.zeros_like(state.convolution))
    for t in range(6, 9):
        y, state = mixer.step(x[:, t], state, here.at(t))
        assert_close(y, whole[:, t])
    assert not torch.allclose(mixer.step(x[:, 6], forgotten, here.at(6))[0], whole[:, 6], rtol=1e-3)


def test_steps_start_between_a_thousandth_and_a_tenth_and_decays_at_the_whole_numbers():
    mixer = Mamba(Site(dim=64), state=5)
    size = nn.functional.softplus(mixer.step_size.bias)
    assert size.min() > 0.00099
    assert size.max() < 0.101
    assert_close(mixer.decay_log.exp(), torch.arange(1.0, 6.0).expand(128, 5))


def test_a_huge_step_forgets_everything_and_nothing_overflows():
    mixer = Mamba(Site(dim=8))
    with torch.no_grad():
        mixer.step_size.bias.fill_(1e4)
    x = torch.randn(2, 40, 8, requires_grad=True)
    y = mixer(x, context(x))
    gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (y, *gradients))


def test_the_memory_stays_exact_under_autocast():
    x = torch.randn(2, 20, 8)
    mixer = Mamba(Site(dim=8))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer.prefill(x, mixer.init_state(2, 20), context(x))
    assert state.memory.dtype == torch.float32
    assert_close(output.float(), mixer(x, context(x)), rtol=0.05, atol=0.02)
