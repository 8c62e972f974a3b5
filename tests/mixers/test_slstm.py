"""The sLSTM: the paper's equations without a stabiliser, and what the stabiliser is for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.mixers.slstm import SLSTM
from llmx.protocol import Context, Site
from tests.forms import perturbed

DIM, HEADS, TIME = 12, 3, 9
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def made() -> tuple[SLSTM, Tensor]:
    mixer = perturbed(SLSTM(Site(dim=DIM), HEADS))
    return mixer, torch.randn(2, TIME, DIM, dtype=torch.float64)


def naive(mixer: SLSTM, x: Tensor) -> Tensor:
    """One row (T, D), head by head, exponentials as they are."""
    width = DIM // HEADS
    smooth = F.silu(mixer.convolution(x[None])[0])
    columns = []
    for head in range(HEADS):
        hidden = cell = normalizer = torch.zeros(width, dtype=x.dtype)
        rows = slice(2 * width * head, 2 * width * (head + 1))
        w_i, w_f = mixer.gates.weight[rows].chunk(2)
        w_z, w_o = mixer.inputs.weight[rows].chunk(2)
        b_i, b_f, b_z, b_o = mixer.bias[4 * width * head : 4 * width * (head + 1)].chunk(4)
        r_i, r_f, r_z, r_o = (matrix.T for matrix in mixer.recurrent[head].chunk(4, 1))
        outputs = []
        for t in range(len(x)):
            i = torch.exp(w_i @ smooth[t] + r_i @ hidden + b_i)
            f = torch.sigmoid(w_f @ smooth[t] + r_f @ hidden + b_f)
            z = torch.tanh(w_z @ x[t] + r_z @ hidden + b_z)
            o = torch.sigmoid(w_o @ x[t] + r_o @ hidden + b_o)
            cell = f * cell + i * z
            normalizer = f * normalizer + i
            hidden = o * cell / normalizer
            deviation = torch.sqrt(hidden.var(correction=0) + 1e-5)
            outputs.append((hidden - hidden.mean()) / deviation * mixer.norm.weight[width * head : width * (head + 1)])
        columns.append(torch.stack(outputs))
    return torch.cat(columns, 1)


def steps(mixer: SLSTM, x: Tensor) -> Tensor:
    state, outputs = mixer.init_state(len(x), x.shape[1]), []
    for t in range(x.shape[1]):
        output, state = mixer.step(x[:, t], state, context(x).at(t))
        outputs.append(output)
    return torch.stack(outputs, 1)


def test_outputs_and_gradients_are_the_paper_without_a_stabiliser():
    mixer, x = made()
    leaves = [x.requires_grad_(), *mixer.parameters()]
    weights = torch.randn(x.shape, dtype=x.dtype)
    expected = torch.stack([naive(mixer, row) for row in x])
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    for output in (mixer(x, context(x)), steps(mixer, x)):
        assert_close(output, expected, **SAME)
        for ours, theirs in zip(torch.autograd.grad((output * weights).sum(), leaves), expected_gradients, strict=True):
            assert_close(ours, theirs, **SAME)


@torch.no_grad()
@pytest.mark.parametrize("shift", [-30.0, 2.0, 30.0])
def test_outputs_do_not_depend_on_the_stabiliser(shift: float):
    mixer, x = made()
    _, state = mixer.prefill(x, mixer.init_state(2, TIME), context(x))
    factor = torch.tensor(-shift, dtype=torch.float64).exp()
    moved = state._replace(
        cell=state.cell * factor, normalizer=state.normalizer * factor, stabilizer=state.stabilizer + shift
    )
    assert_close(mixer.prefill(x, moved, context(x))[0], mixer.prefill(x, state, context(x))[0], **SAME)
    here = context(x).at(0)
    assert_close(mixer.step(x[:, 0], moved, here)[0], mixer.step(x[:, 0], state, here)[0], **SAME)


@pytest.mark.parametrize("size", [-500.0, 500.0])
def test_gates_beyond_the_exponential_leave_outputs_and_gradients_finite(size: float):
    """exp(500) overflows in fp32 and exp(-500) is nothing: a constant in all input gates cancels in c / n."""
    mixer, x = made()
    mixer, x = mixer.float(), x.float()
    expected = mixer(x, context(x))
    with torch.no_grad():
        mixer.bias.view(HEADS, 4, -1)[:, 0] += size
    output = mixer(x, context(x))
    assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert_close(steps(mixer, x), output, rtol=1e-3, atol=1e-3)
    for gradient in torch.autograd.grad(output.square().sum(), list(mixer.parameters())):
        assert gradient.isfinite().all()


@torch.no_grad()
def test_the_normaliser_never_falls_below_one():
    mixer, _ = made()
    x = 30 * torch.randn(3, 200, DIM, dtype=torch.float64)
    state = mixer.init_state(3, 200)
    for t in range(200):
        _, state = mixer.step(x[:, t], state, context(x).at(t))
        assert state.normalizer.min() >= 1


@torch.no_grad()
def test_heads_do_not_talk_to_each_other_through_the_recurrence():
    mixer, x = made()
    before = mixer(x, context(x))
    mixer.recurrent[1] += 1.0
    change = (mixer(x, context(x)) - before).abs().amax((0, 1)).view(HEADS, -1).amax(1)
    assert change[1] > 1e-3
    assert not change[0]
    assert not change[2]


def test_it_starts_as_the_paper_does():
    first, last = (SLSTM(Site(dim=DIM, layer=layer, depth=3), HEADS) for layer in (0, 2))
    for mixer, power in ((first, 0.3), (last, 1.6)):
        i, f, z, o = mixer.bias.view(HEADS, 4, -1).unbind(1)
        expected = 5 - 12 * (torch.arange(4) / 3) ** power
        assert_close(f, expected.expand(HEADS, -1))
        assert not any(other.any() for other in (i, z, o))
        assert not mixer.recurrent.any()


def test_the_state_stays_exact_under_autocast():
    torch.manual_seed(0)
    mixer, x = SLSTM(Site(dim=DIM), HEADS), torch.randn(2, TIME, DIM)
    nn.init.normal_(mixer.recurrent, std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer.prefill(x, mixer.init_state(2, TIME), context(x))
    assert state.cell.dtype == torch.float32
    assert_close(output.float(), mixer(x, context(x)), rtol=0.1, atol=0.1)


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"^heads: "):
        SLSTM(Site(dim=DIM), heads=5)
