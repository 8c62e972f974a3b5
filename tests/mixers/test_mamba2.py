"""Mamba-2 against the Mamba2Mixer of transformers, and its traps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.mixers.mamba2 import Mamba2
from llmx.protocol import Site
from tests.parity import Named, assert_same_mixer, context, randomised, values

reference = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
config = pytest.importorskip("transformers.models.mamba2.configuration_mamba2")

SHAPES = [(1, 1, 8, 4, 8, 4), (2, 7, 8, 2, 5, 4), (3, 37, 12, 3, 16, 3)]  # batch, time, dim, heads, state, convolution


def as_mamba2(mixer: Mamba2, tensors: Named) -> Named:
    return {
        "A_log": tensors["decay_log"],
        "D": tensors["skip"],
        "dt_bias": tensors["step_bias"],
        "in_proj.weight": tensors["project.weight"],
        "conv1d.weight": tensors["convolution.taps"].t()[:, None],
        "conv1d.bias": tensors["convolution.bias"],
        "norm.weight": tensors["norm.weight"],
        "out_proj.weight": tensors["out.weight"],
    }


@pytest.mark.parametrize(("batch", "time", "dim", "heads", "state", "convolution"), SHAPES)
def test_outputs_and_gradients_are_those_of_mamba2(batch, time, dim, heads, state, convolution):
    ours = randomised(Mamba2(Site(dim=dim), heads=heads, state=state, convolution=convolution), 0.3)
    theirs: nn.Module = reference.Mamba2Mixer(
        config.Mamba2Config(
            hidden_size=dim,
            num_heads=heads,
            head_dim=2 * dim // heads,
            state_size=state,
            conv_kernel=convolution,
            n_groups=1,
            chunk_size=8,
            layer_norm_epsilon=ours.norm.eps,
        ),
        0,
    )
    theirs.load_state_dict(as_mamba2(ours, values(ours)))
    assert_same_mixer(ours, theirs, theirs, as_mamba2, batch, time, dim)


def test_the_norm_comes_after_the_gate():
    torch.manual_seed(0)
    mixer = Mamba2(Site(dim=8), heads=2, state=4)
    x, seen = torch.randn(1, 5, 8), []
    mixer.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mixer(x, context(x))
    assert_close(seen[0].square().mean(-1), torch.ones(1, 5), rtol=0.05, atol=0.05)


def test_a_huge_step_forgets_everything_and_nothing_overflows():
    mixer = Mamba2(Site(dim=8), heads=2, state=4)
    with torch.no_grad():
        mixer.step_bias.fill_(1e4)
    x = torch.randn(2, 100, 8, requires_grad=True)
    y = mixer(x, context(x))
    gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (y, *gradients))


def test_the_start_is_that_of_the_paper():
    mixer = Mamba2(Site(dim=64), heads=64)
    size, strength = nn.functional.softplus(mixer.step_bias), mixer.decay_log.exp()
    assert size.min() > 0.00099
    assert size.max() < 0.101
    assert strength.min() > 0.99
    assert strength.max() < 16.01


def test_the_memory_stays_exact_under_autocast():
    x = torch.randn(2, 20, 8)
    mixer = Mamba2(Site(dim=8), heads=2, state=4)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer.prefill(x, mixer.init_state(2, 20), context(x))
    assert state.memory.dtype == torch.float32
    assert_close(output.float(), mixer(x, context(x)), rtol=0.05, atol=0.03)
