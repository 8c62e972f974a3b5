"""The value residual: its equation, and that the first layer's values reach the layers above in every form."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.cycle import Cycle
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.mixers.qk_norm import QKNormAttention
from llmx.mixers.value_residual import ValueResidualAttention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from llmx.protocol import Context, Site

VOCAB, DIM, TIME = 13, 16, 7
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def block(mixer=ValueResidualAttention, **arguments):
    return partial(PreNormBlock, mixer=partial(mixer, heads=4, **arguments), feed_forward=partial(SwiGLU, hidden=12))


def decoder(made=None, depth: int = 3) -> Decoder:
    torch.manual_seed(0)
    network = Decoder(VOCAB, made or block(), dim=DIM, depth=depth).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


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


def naive(mixer: ValueResidualAttention, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The equation with a loop over positions and heads; rotary as multiplication by complex numbers."""
    batch, time, dim = x.shape
    width, groups = mixer.head_dim, mixer.kv_heads
    sizes = [mixer.heads * width, groups * width, groups * width]
    query, key, value = (x @ matrix.T for matrix in mixer.qkv.weight.split(sizes))
    own = value
    if first is not None:
        value = mixer.shares[0] * value + mixer.shares[1] * first
    frequencies = mixer.rotary_base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)

    def turned(vector: Tensor, t: int) -> Tensor:
        pairs = torch.complex(vector[: width // 2], vector[width // 2 :]) * torch.exp(1j * t * frequencies)
        return torch.cat((pairs.real, pairs.imag))

    rows = []
    for b in range(batch):
        for t in range(time):
            heads = []
            for h in range(mixer.heads):
                g = h // (mixer.heads // groups)
                q = turned(query[b, t, h * width : (h + 1) * width], t)
                slot = slice(g * width, (g + 1) * width)
                scores = torch.stack([q @ turned(key[b, s, slot], s) for s in range(t + 1)]) / width**0.5
                heads.append(scores.softmax(0) @ value[b, : t + 1, slot])
            rows.append(torch.cat(heads) @ mixer.out.weight.T)
    return torch.stack(rows).view(batch, time, dim), own


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_two_layers_are_the_equation(kv_heads: int):
    torch.manual_seed(0)
    mixers = [
        ValueResidualAttention(Site(dim=DIM, layer=layer, depth=2, occurrence=layer), 4, kv_heads).double()
        for layer in range(2)
    ]
    for parameter in [p for mixer in mixers for p in mixer.parameters()]:
        nn.init.normal_(parameter, std=0.4)
    x, z = torch.randn(2, 2, 5, DIM, dtype=torch.float64).unbind()
    context = Context(torch.zeros(2, 5, dtype=torch.int64), torch.arange(5)[None], x)
    expected, value = naive(mixers[0], x, None)
    assert_close(mixers[0](x, context), expected, **SAME)
    assert_close(context.store["first value"], value, **SAME)
    assert_close(mixers[1](z, context), naive(mixers[1], z, value)[0], **SAME)
    assert_close(context.store["first value"], value, **SAME)  # the second layer leaves the first one's


def test_only_later_layers_have_the_two_numbers_and_they_start_at_a_half():
    network = Decoder(VOCAB, block(), dim=DIM, depth=3)
    assert network.layers[0].mixer.shares is None
    for layer in network.layers[1:]:
        assert layer.mixer.shares.tolist() == [0.5, 0.5]
    named = [name for name, _ in network.named_parameters() if "shares" in name]
    assert named == ["blocks.1.mixer.shares", "blocks.2.mixer.shares"]


@pytest.mark.parametrize("form", [forward, step, prefill])
def test_the_first_layers_values_reach_the_layers_above_in_every_form(form):
    network = decoder()
    first = network.layers[0].mixer
    nn.init.zeros_(first.out.weight)  # now they leave the layer through the store alone
    before = form(network)
    gradient = torch.autograd.grad(before.square().sum(), first.qkv.weight)[0]
    query, key, value = gradient.chunk(3)
    assert value.abs().min() > 1e-6
    assert not query.any()
    assert not key.any()
    with torch.no_grad():
        first.qkv.weight[-DIM:] += 0.1
        assert (form(network) - before).abs().amax((0, 2)).min() > 1e-3  # at every position


@pytest.mark.parametrize("form", [forward, step, prefill])
@pytest.mark.parametrize(
    ("arguments", "other"), [({}, Attention), ({"norm": partial(RMSNorm, eps=1e-6)}, QKNormAttention)]
)
def test_without_the_share_of_the_first_layer_it_is_attention(form, arguments, other):
    mixed, plain = decoder(block(**arguments)), decoder(block(other))
    for layer in mixed.layers[1:]:
        layer.mixer.shares.data = torch.tensor([1.0, 0.0], dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in mixed.state_dict().items() if "shares" not in name})
    assert_close(form(mixed), form(plain), **SAME)
    mixed.layers[2].mixer.shares.data[1] = 0.5
    assert not torch.allclose(form(mixed), form(plain))


def test_in_a_hybrid_the_first_layer_is_the_first_of_its_kind():
    network = decoder(partial(Cycle, blocks=[block(Attention), block()]), depth=4)
    assert network.layers[1].mixer.shares is None
    assert network.layers[3].mixer.shares is not None
    assert_close(step(network), forward(network), **SAME)


@pytest.mark.parametrize(("name", "arguments"), [("heads", {"heads": 3}), ("kv_heads", {"heads": 4, "kv_heads": 3})])
def test_head_counts_that_do_not_divide_are_named(name: str, arguments: dict[str, int]):
    with pytest.raises(ValueError, match=f"^{name}: "):
        ValueResidualAttention(Site(dim=DIM), **arguments)
