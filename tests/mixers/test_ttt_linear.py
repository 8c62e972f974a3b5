"""TTT-Linear: the paper's inner training, its gradients taken by autograd, a token at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.ttt_linear import EPS, TTTLinear
from llmx.parts.rotary import rotary_table, rotate
from llmx.protocol import Context, Site
from tests.forms import assert_same_outputs_and_gradients, perturbed
from tests.mini_batches import assert_a_token_reads_up_to_its_own, assert_rows_stand_where_they_like
from tests.parity import context, randomised

DIM, TIME, BATCH = 12, 37, 2


def moving(mixer: TTTLinear) -> TTTLinear:
    """With weights of any size, and steps above 0: a place with a step of 0 reads no gradient at all."""
    mixer = perturbed(mixer)
    with torch.no_grad():
        mixer.step_size.abs_()
    return mixer


def model(mixer: TTTLinear, z: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """f: z (B, H, K), weights (B, H, K, K), bias (B, H, K) -> (B, H, K)."""
    normed = F.layer_norm((z[..., None, :] @ weights)[..., 0, :] + bias, z.shape[-1:], eps=EPS)
    return z + normed * mixer.inner_weight.view(mixer.heads, -1) + mixer.inner_bias.view(mixer.heads, -1)


def rows(mixer: TTTLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value (B, T, H, K), rate (B, T, H)."""
    qkv, rate = mixer.project(x).split(mixer.widths, -1)
    query, key, value = qkv.unflatten(-1, (3, mixer.heads, -1)).unbind(2)
    table = rotary_table(torch.arange(x.shape[1]) % mixer.mini_batch, mixer.head_dim, 10000.0, x.dtype)[:, None]
    rate = mixer.base_rate * torch.sigmoid(rate + mixer.rate_bias) / mixer.head_dim
    return rotate(query, table), rotate(key, table), value, rate


def paper(mixer: TTTLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The primal form: outputs (B, T, D), then the weights with the bias below them where the last mini-batch began,
    and the sum of its gradients, (B, H, K + 1, K)."""
    query, key, value, rate = rows(mixer, x)
    start = [
        mixer.weights.expand(len(x), -1, -1, -1) * 1,
        mixer.bias.view(mixer.heads, -1).expand(len(x), -1, -1) * 1,
    ]
    sums = [torch.zeros_like(part) for part in start]
    outputs = []

    def moved(size: Tensor) -> list[Tensor]:
        return [part - size * total for part, total in zip(start, sums, strict=True)]

    sizes = [torch.clamp(1 / (j + 1) + mixer.step_size[j], min=0.0) for j in range(mixer.mini_batch)]
    for t in range(x.shape[1]):
        place = t % mixer.mini_batch
        if place == 0:
            start = moved(sizes[-1])
            sums = [torch.zeros_like(part) for part in start]
        error = model(mixer, key[:, t], *start) - value[:, t]
        slopes = torch.autograd.grad(error.square().sum() / 2, start, create_graph=True)
        weighed = [rate[:, t].view(*rate[:, t].shape, *[1] * (slope.ndim - 2)) * slope for slope in slopes]
        sums = [total + slope for total, slope in zip(sums, weighed, strict=True)]
        outputs.append(model(mixer, query[:, t], *moved(sizes[place])).flatten(1))
    joined = [torch.cat((weights, bias[:, :, None]), 2) for weights, bias in (start, sums)]
    return mixer.out(mixer.norm(torch.stack(outputs, 1))), *joined


@pytest.mark.parametrize(("heads", "mini_batch", "time"), [(3, 16, TIME), (2, 5, TIME), (1, 1, 9), (3, 16, 7)])
def test_outputs_state_and_gradients_are_those_of_the_paper(heads: int, mini_batch: int, time: int):
    mixer = moving(TTTLinear(Site(DIM), heads, mini_batch))
    x = torch.randn(BATCH, time, DIM, dtype=torch.float64, requires_grad=True)

    def joined(outputs: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in (outputs, weights, gradient)], 1)

    def prefilled() -> Tensor:
        outputs, state = mixer.prefill(x, mixer.init_state(BATCH, time), context(x))
        return joined(outputs, *state)

    assert_same_outputs_and_gradients(mixer, [x], lambda: joined(*paper(mixer, x)), prefilled)
    assert_same_outputs_and_gradients(mixer, [x], lambda: paper(mixer, x)[0], lambda: mixer(x, context(x)))


@torch.no_grad()
def test_a_token_reads_the_gradients_of_its_mini_batch_up_to_its_own_and_no_later_ones():
    mixer = moving(TTTLinear(Site(DIM), heads=3))
    assert_a_token_reads_up_to_its_own(mixer, DIM, 16, (1, 7, 15))


@torch.no_grad()
def test_rows_may_stand_at_different_places_of_their_mini_batches():
    mixer = moving(TTTLinear(Site(DIM), heads=3))
    assert_rows_stand_where_they_like(mixer, DIM, (3, 16, 21), 20)


@torch.no_grad()
def test_training_on_a_text_lowers_its_inner_loss():
    """The model of the first head, after each mini-batch of one and the same 16 tokens."""
    mixer = TTTLinear(Site(32), heads=2, base_rate=4.0).double()
    torch.nn.init.normal_(mixer.project.weight, std=0.2)
    x = torch.randn(1, 16, 32, dtype=torch.float64)
    _, key, value, _ = rows(mixer, x)
    state, losses = mixer.init_state(1, 0), []
    for n in range(6):
        weights = (state.weights - state.gradient / 16).expand(16, -1, -1, -1)
        error = model(mixer, key[0], weights[..., :-1, :], weights[..., -1, :]) - value[0]
        losses.append(error.square().mean().item())
        here = Context(torch.zeros(1, 16), torch.arange(16 * n, 16 * n + 16)[None], x)
        _, state = mixer.prefill(x, state, here)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_a_long_text_in_float32_stays_finite_and_close_to_float64():
    mixer = randomised(TTTLinear(Site(32), heads=2), 0.15)
    mixer.step_size.zero_()
    x = torch.randn(1, 4096, 32)
    outputs, state = mixer.prefill(x, mixer.init_state(1, 4096), context(x))
    assert all(tensor.isfinite().all() for tensor in (outputs, *state))
    exact = mixer.double()(x.double(), context(x.double()))
    assert_close(outputs.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_weights_that_train_stay_exact_under_autocast():
    mixer = TTTLinear(Site(DIM), heads=3)
    x = torch.randn(2, 40, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = mixer.prefill(x, mixer.init_state(2, 40), context(x))
    assert {part.dtype for part in state} == {torch.float32}
    gradients = torch.autograd.grad(outputs.float().sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (outputs, *state, *gradients))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("heads", {"heads": 4}),
        ("mini_batch", {"heads": 2, "mini_batch": 0}),
        ("base_rate", {"heads": 2, "base_rate": 0}),
    ],
)
def test_arguments_that_do_not_work_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        TTTLinear(Site(DIM), **({"heads": 3} | arguments))
