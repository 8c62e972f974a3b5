"""RWKV-7: the paper's equations token by token, the value residual, the shift, and where it starts."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.cycle import Cycle
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.rwkv_channel_mix import RWKVChannelMix
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.mixers.rwkv7 import FIRST_VALUE, RWKV7
from llmx.networks.decoder import Decoder
from llmx.protocol import Context, Site
from tests.forms import perturbed

VOCAB, DIM, HEADS, TIME = 13, 16, 2, 37
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def naive(mixer: RWKV7, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """One row (T, D), token by token and head by head, with S (values by keys) as the paper has it."""
    dim, width = x.shape[1], mixer.head_dim
    memory = torch.zeros(mixer.heads, width, width, dtype=x.dtype)
    last, outputs, values = torch.zeros(dim, dtype=x.dtype), [], []

    def through(low, vector: Tensor, f=lambda few: few) -> Tensor:
        few = f(low.down.weight @ vector)
        return low.up.weight @ few + (0 if low.up.bias is None else low.up.bias)

    for t, now in enumerate(x):
        for_r, for_w, for_k, for_v, for_a, for_g = ((1 - m) * now + m * last for m in mixer.shifts)
        last = now
        r, k, v = mixer.receptance.weight @ for_r, mixer.key.weight @ for_k, mixer.value.weight @ for_v
        if first is not None:
            share = torch.sigmoid(through(mixer.share, for_v))
            v = (1 - share) * v + share * first[t]
        values.append(v)
        w = torch.exp(-torch.exp(-F.softplus(-through(mixer.decay, for_w, torch.tanh)) - 0.5))
        a = torch.sigmoid(through(mixer.rate, for_a))
        g = through(mixer.gate, for_g, torch.sigmoid)
        e = k * mixer.erase_scale
        k = k * (1 + (a - 1) * mixer.rate_scale)
        heads = []
        for h in range(mixer.heads):
            slot = slice(h * width, (h + 1) * width)
            unit = e[slot] / e[slot].norm()
            transition = torch.diag(w[slot]) - torch.outer(unit, a[slot] * unit)
            memory[h] = memory[h] @ transition + torch.outer(v[slot], k[slot])
            read = memory[h] @ r[slot]
            normed = (read - read.mean()) / torch.sqrt(read.var(correction=0) + 64e-5 * width / 64)
            bonus = (r[slot] * mixer.bonus[slot] * k[slot]).sum() * v[slot]
            heads.append(normed * mixer.norm_weight[slot] + mixer.norm_bias[slot] + bonus)
        outputs.append(mixer.out.weight @ (g * torch.cat(heads)))
    return torch.stack(outputs), torch.stack(values)


@torch.no_grad()
def test_two_layers_are_the_paper():
    mixers = [perturbed(RWKV7(Site(DIM, layer, 2, layer), HEADS)) for layer in range(2)]
    x, z = torch.randn(2, 1, TIME, DIM, dtype=torch.float64).unbind()
    here = context(x)
    expected, value = naive(mixers[0], x[0], None)
    assert_close(mixers[0](x, here)[0], expected, **SAME)
    assert_close(here.store[FIRST_VALUE][0], value, **SAME)
    assert_close(mixers[1](z, here)[0], naive(mixers[1], z[0], value)[0], **SAME)
    assert_close(here.store[FIRST_VALUE][0], value, **SAME)  # the second layer leaves the first one's


def block(**arguments):
    return partial(PreNormBlock, mixer=partial(RWKV7, heads=HEADS, **arguments), feed_forward=RWKVChannelMix)


def decoder(made=None, depth: int = 3) -> Decoder:
    torch.manual_seed(0)
    return perturbed(Decoder(VOCAB, made or block(), dim=DIM, depth=depth))


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, TIME), generator=torch.Generator().manual_seed(1))


def forward(network: Decoder) -> Tensor:
    return network(tokens())


def prefill(network: Decoder) -> Tensor:
    first, state = network.prefill(tokens()[:, :3], network.init_state(2, TIME))
    return torch.cat((first, network.prefill(tokens()[:, 3:], state)[0]), 1)


def step(network: Decoder) -> Tensor:
    state, logits = network.init_state(2, TIME), []
    for t in range(TIME):
        one, state = network.step(tokens()[:, t], state)
        logits.append(one)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("form", [forward, step, prefill])
def test_the_first_layers_values_reach_the_layers_above_in_every_form(form):
    network = decoder()
    first = network.layers[0].mixer
    nn.init.zeros_(first.out.weight)  # now they leave the layer through the store alone
    before = form(network)
    value, key = torch.autograd.grad(before.square().sum(), [first.value.weight, first.key.weight])
    assert value.abs().min() > 0
    assert not key.any()
    with torch.no_grad():
        first.value.weight.zero_()
        assert (form(network) - before).abs().amax((0, 2)).min() > 1e-4  # at every position


def test_in_a_hybrid_the_first_layer_is_the_first_of_its_kind():
    attention = partial(PreNormBlock, mixer=partial(Attention, heads=HEADS), feed_forward=SwiGLU)
    network = decoder(partial(Cycle, blocks=[attention, block()]), depth=4)
    assert network.layers[1].mixer.share is None
    assert network.layers[3].mixer.share is not None
    assert_close(step(network), forward(network), **SAME)


@torch.no_grad()
def test_the_shift_reads_the_token_before_and_never_one_ahead():
    mixer = perturbed(RWKV7(Site(DIM), HEADS))
    x = torch.randn(1, TIME, DIM, dtype=torch.float64)
    before = mixer(x, context(x))
    for t in (0, 20, TIME - 1):
        moved = x.clone()
        moved[:, t] += 1
        change = (mixer(moved, context(moved)) - before).abs().amax((0, 2))
        assert not change[:t].any()
        assert change[t : t + 2].min() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_long_texts_stay_exact(dtype: torch.dtype, tolerance: float):
    """4,096 tokens in chunks, fp32 or under bf16 autocast, against float64, relative to the largest output."""
    mixer = RWKV7(Site(DIM), HEADS)
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(1, 4096, DIM)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = mixer(x, context(x))
    assert output.dtype == dtype
    exact = mixer.double()(x.double(), context(x))
    assert (output - exact).abs().max() < tolerance * exact.abs().max()


def test_it_starts_as_the_paper_does():
    first, last = (RWKV7(Site(DIM, layer, 4, layer), HEADS) for layer in (0, 3))
    x = torch.randn(1, 3, DIM)
    assert not first(x, context(x)).any()  # the output projection is 0
    for mixer in (first, last):
        assert_close(mixer.value.weight @ mixer.value.weight.T, torch.eye(DIM), rtol=0, atol=1e-5)
        assert_close(mixer.key.weight @ mixer.key.weight.T, 0.01 * torch.eye(DIM), rtol=0, atol=1e-5)
        assert not mixer.decay.down.weight.any()
        # the first channel of the first head is the slowest, the last of the last head the fastest
        assert_close(mixer.decay.up.bias[0].item(), -8.0)
        assert_close(mixer.decay.up.bias[-1].item(), 3.0)
    assert_close(first.norm_weight[0].item(), 0.25**0.7)
    assert_close(last.norm_weight[0].item(), 1.0)
    assert [round(m[4].item(), 4) for m in first.shifts] == [
        round(1 - 0.25**power, 4) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
    ]
    assert first.share is None
    assert_close(last.share.up.bias.mean().item(), 0.73)


def test_no_channel_fades_faster_than_the_floor():
    mixer = RWKV7(Site(DIM), HEADS)
    nn.init.constant_(mixer.decay.up.bias, 50.0)
    rows, _ = mixer._project(torch.randn(1, 3, DIM), torch.zeros(1, 3, DIM), context(torch.zeros(1, 3, DIM)))
    assert_close(rows.log_decay.exp(), torch.full_like(rows.log_decay, math.exp(-math.exp(-0.5))))


@pytest.mark.parametrize(
    ("name", "arguments"), [("heads", {"heads": 3}), ("heads", {"heads": 16}), ("gate_rank", {"gate_rank": 0})]
)
def test_sizes_that_do_not_work_are_named(name: str, arguments: dict[str, int]):
    with pytest.raises(ValueError, match=f"^{name}: "):
        RWKV7(Site(dim=DIM), **arguments)
