"""The reproduced experiment: its exact size, its leak, its arithmetic against slow texts."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.networks.founding import (
    FoundingAttention,
    FoundingDifferentialAttention,
    FoundingFeedForward,
    FoundingNetwork,
    FoundingNorm,
)
from llmx.protocol import Context, Mixer, Site

SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order
ANGLES = {"rtol": 1e-5, "atol": 1e-5}  # the rotary angles are computed in float32, as they were
KINDS = [FoundingAttention, FoundingDifferentialAttention]


def small(mixer: type[Mixer] = FoundingAttention, window: int = 6) -> FoundingNetwork:
    torch.manual_seed(0)
    return FoundingNetwork(
        11, partial(mixer, heads=2), partial(FoundingFeedForward, hidden=10), dim=8, depth=2, window=window
    ).double()


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


@pytest.mark.parametrize(
    ("mixer", "parameters"), [(FoundingAttention, 1_112_781), (FoundingDifferentialAttention, 1_113_421)]
)
def test_the_published_networks_have_exactly_their_parameters(mixer: type[Mixer], parameters: int):
    network = FoundingNetwork(65, mixer)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("mixer", KINDS)
def test_the_leak_is_reproduced_so_that_the_last_token_moves_the_first_logits(mixer: type[Mixer]):
    network = small(mixer)
    text = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = text.clone()
    changed[:, -1] = 7
    assert ((network(text) - network(changed)).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("mixer", KINDS)
def test_the_norm_is_the_only_leak(mixer: type[Mixer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FoundingNorm, "forward", lambda self, x: nn.functional.rms_norm(x, x.shape[-1:]))
    network = small(mixer)
    text = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = text.clone()
    changed[:, -1] = 7
    assert_close(network(text)[:, :-1], network(changed)[:, :-1], rtol=0, atol=1e-12)


def test_the_norm_divides_by_one_root_mean_square_over_time_and_dim():
    norm = FoundingNorm(5, 4).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    for row in range(3):
        rms = math.sqrt(sum(number**2 for number in x[row].flatten().tolist()) / 16)
        assert_close(norm(x)[row], x[row] / rms * norm.weight[:4], **SAME)


def test_rows_of_a_batch_do_not_see_each_other():
    network, text = small(), torch.randint(11, (3, 6))
    assert_close(network(text)[1:2], network(text[1:2]), **SAME)


def test_a_shorter_input_is_accepted_and_a_longer_one_names_the_window():
    network = small(window=6)
    assert network(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)
    with pytest.raises(ValueError, match=r"^window: 7 .* 6"):
        network(torch.zeros(1, 7, dtype=torch.int64))


def test_one_norm_a_layer_serves_twice_and_the_residual_is_added_to_the_normalised_stream():
    network, text = small(), torch.randint(11, (2, 6))
    x = network.embedding(text)
    for block in network.blocks:
        for part in (block.mixer, block.feed_forward):
            normed = x / x.square().mean((1, 2), keepdim=True).sqrt() * block.norm.weight
            x = normed + part(normed, context(normed))
    assert_close(network(text), x @ network.head.weight.T + network.head.bias, **SAME)


def turned(vector: Tensor, position: int, width: int) -> Tensor:
    """The pairs (2 i, 2 i + 1) as complex numbers, turned by position * 10000^(-2 i / width)."""
    pairs = [complex(vector[2 * i], vector[2 * i + 1]) for i in range(len(vector) // 2)]
    unit = [
        complex(math.cos(a), math.sin(a)) for a in (position * 10000.0 ** (-2 * i / width) for i in range(len(pairs)))
    ]
    return torch.tensor([pair * one for pair, one in zip(pairs, unit, strict=True)], dtype=torch.complex128)


def slow_attention(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """One head, one query at a time: query, key (T, K), value (T, V); the rotary table is `width` wide."""
    rows = []
    for t in range(len(query)):
        q = turned(query[t], t, width)
        scores = torch.stack([(q * turned(key[s], s, width).conj()).real.sum() for s in range(t + 1)])
        rows.append((scores / math.sqrt(query.shape[1])).softmax(0) @ value[: t + 1])
    return torch.stack(rows)


@torch.no_grad()
def test_attention_is_causal_softmax_with_interleaved_rotary_pairs():
    torch.manual_seed(0)
    mixer, x = FoundingAttention(Site(dim=16), heads=2).double(), 3 * torch.randn(1, 6, 16, dtype=torch.float64)
    query, key, value = (linear(x)[0].chunk(2, -1) for linear in (mixer.query, mixer.key, mixer.value))
    heads = [slow_attention(*qkv, width=8) for qkv in zip(query, key, value, strict=True)]
    assert_close(mixer(x, context(x))[0], mixer.out(torch.cat(heads, -1)), **ANGLES)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_differential_attention_is_the_difference_of_two(layer: int):
    """Queries and keys are half as wide as values, and use the first half of a table as wide as the values."""
    torch.manual_seed(0)
    mixer = FoundingDifferentialAttention(Site(dim=16, layer=layer, depth=4), heads=2).double()
    nn.init.normal_(mixer.norm.weight)
    x = 3 * torch.randn(1, 6, 16, dtype=torch.float64)
    query, key = (linear(x)[0].chunk(4, -1) for linear in (mixer.query, mixer.key))
    value = mixer.value(x)[0].chunk(2, -1)
    init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lq1, lk1, lq2, lk2 = mixer.lambdas
    scale = math.exp(lq1 @ lk1) - math.exp(lq2 @ lk2) + init
    heads = []
    for h in range(2):
        first = slow_attention(query[2 * h], key[2 * h], value[h], width=8)
        second = slow_attention(query[2 * h + 1], key[2 * h + 1], value[h], width=8)
        difference = first - scale * second
        rms = (difference.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        heads.append(difference / rms * mixer.norm.weight * (1 - init))
    assert_close(mixer(x, context(x))[0], mixer.out(torch.cat(heads, -1)), **ANGLES)


def test_lambda_starts_by_the_layer_counted_from_0():
    network = FoundingNetwork(11, FoundingDifferentialAttention, dim=16, depth=4)
    assert [block.mixer.lambda_init for block in network.layers] == pytest.approx(
        [0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-0.6), 0.8 - 0.6 * math.exp(-0.9)]
    )


def test_parameters_start_as_pytorch_starts_them():
    torch.manual_seed(0)
    network = FoundingNetwork(65)
    assert network.embedding.weight.std().item() == pytest.approx(1, rel=0.05)  # 8,320 draws from N(0, 1): 0.8 % error
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 4 * 7 + 1
    for name, linear in linears.items():
        bound = linear.in_features**-0.5  # uniform in [-bound, bound]
        assert linear.weight.abs().max() <= bound, name
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        assert linear.bias is None or 0 < linear.bias.abs().max() <= bound, name
    norms = [module.weight for module in network.modules() if isinstance(module, FoundingNorm)]
    assert all(torch.equal(weight, torch.ones(32, 128)) for weight in norms)


def test_gradients_reach_every_parameter():
    for mixer in KINDS:
        network, text = small(mixer), torch.randint(11, (2, 6))
        network.losses(text, text.flip(1))[0].sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_the_founding_network_has_no_state():
    assert not small().stateful
