"""The RG-LRU against the recurrent block of transformers' RecurrentGemma, and near a decay of 1."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.mixers.rg_lru import RGLRU
from llmx.protocol import Context, Site
from tests.parity import Named, assert_same_mixer, context, randomised, values

gemma = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
config = pytest.importorskip("transformers.models.recurrent_gemma.configuration_recurrent_gemma")

SHAPES = [(1, 1, 8, 2, 4), (2, 7, 8, 4, 4), (3, 21, 12, 3, 2)]  # batch, time, dim, heads, convolution


def as_gemma(mixer: RGLRU, tensors: Named) -> Named:
    u_weight, gate_weight = tensors["project.weight"].chunk(2)
    u_bias, gate_bias = tensors["project.bias"].chunk(2)
    (r, i), (r_bias, i_bias) = tensors["gates"].chunk(2, -1), tensors["gate_bias"].chunk(2, -1)
    return {
        "linear_x.weight": u_weight,
        "linear_x.bias": u_bias,
        "linear_y.weight": gate_weight,
        "linear_y.bias": gate_bias,
        "linear_out.weight": tensors["out.weight"],
        "linear_out.bias": tensors["out.bias"],
        "conv_1d.weight": tensors["convolution.taps"].t()[:, None],
        "conv_1d.bias": tensors["convolution.bias"],
        "rg_lru.recurrent_param": tensors["decay"],
        "rg_lru.recurrent_gate_weight": r,
        "rg_lru.recurrent_gate_bias": r_bias,
        "rg_lru.input_gate_weight": i,
        "rg_lru.input_gate_bias": i_bias,
    }


@pytest.mark.parametrize(("batch", "time", "dim", "heads", "convolution"), SHAPES)
def test_outputs_and_gradients_are_those_of_recurrent_gemma(batch, time, dim, heads, convolution):
    ours = randomised(RGLRU(Site(dim=dim), heads=heads, convolution=convolution), 0.5)
    theirs: nn.Module = gemma.RecurrentGemmaRecurrentBlock(
        config.RecurrentGemmaConfig(
            hidden_size=dim,
            lru_width=dim,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            conv1d_width=convolution,
        ),
        0,
    )
    theirs.load_state_dict(as_gemma(ours, values(ours)))

    def run(x):
        return theirs(x, torch.arange(time).expand(batch, -1), None, use_cache=False)[0]

    assert_same_mixer(ours, theirs, run, as_gemma, batch, time, dim)


def test_what_enters_next_to_a_decay_of_1_is_right_in_float32():
    mixer = RGLRU(Site(dim=4), heads=1)
    with torch.no_grad():
        mixer.decay.fill_(-18.0)  # the rate is exp(-18), and 1 - a^2 in float32 is 0 or 1.2e-7
        u, positions = torch.ones(1, 5, 4), torch.arange(1, 6)[None]
        _, entered = mixer._recurrence(u, positions)
        _, exact = mixer.double()._recurrence(u.double(), positions)
    assert_close(entered, exact.float(), rtol=1e-5, atol=0)
    assert entered.min() > 1e-5


def test_gradients_stay_finite_where_nothing_is_forgotten():
    mixer = RGLRU(Site(dim=4), heads=1)
    with torch.no_grad():
        mixer.decay.fill_(-200.0)  # the rate is 0, a is 1
    x = torch.randn(2, 6, 4, requires_grad=True)
    gradients = torch.autograd.grad(mixer(x, context(x)).square().sum(), [x, *mixer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_only_the_first_token_of_a_text_enters_whole():
    mixer = RGLRU(Site(dim=4), heads=1)
    u = torch.ones(1, 3, 4)
    decay, entered = mixer._recurrence(u, torch.arange(3)[None])
    gate = mixer._recurrence(u, torch.zeros(1, 3))[1]  # the input gate alone
    assert_close(entered[:, :1], gate[:, :1])
    assert_close(entered[:, 1:], (gate * (1 - decay.square()).sqrt())[:, 1:])
    x = torch.randn(1, 5, 4)
    later = Context(torch.zeros(1, 5, dtype=torch.int64), torch.arange(3, 8)[None], x)
    assert not torch.allclose(mixer(x, later)[:, 0], mixer(x, context(x))[:, 0])


def test_an_open_gate_decays_by_0_9_to_0_999_at_the_start():
    mixer = RGLRU(Site(dim=1000))
    decay = torch.exp(-8 * nn.functional.softplus(mixer.decay))
    assert decay.min() > 0.899
    assert decay.max() < 0.9991
    assert math.isclose(decay.mean().item(), 0.9495, abs_tol=0.005)
