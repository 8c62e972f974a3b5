"""The wirings of a decoder: skips across the middle, and the same blocks several times over."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from llmx.audits.equivalence import audit_equivalence
from llmx.blocks.hyper_connections import HyperConnectionBlock
from llmx.blocks.prenorm import PreNormBlock
from llmx.costs.describe import describe
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.mixers.value_residual import ValueResidualAttention
from llmx.networks.decoder import Decoder
from llmx.networks.stacks import EmbeddingSkip, Looped, Sequential, UNet
from llmx.protocol import Site, Stack

VOCAB, TIME = 13, 9
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def decoder(stack: Any, depth: int, mixer: Any = Attention, block: Any = PreNormBlock) -> Decoder:
    torch.manual_seed(0)
    made = partial(block, mixer=partial(mixer, heads=4), feed_forward=partial(SwiGLU, hidden=12))
    network = Decoder(VOCAB, made, dim=16, depth=depth, stack=stack).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def tokens(time: int = TIME) -> Tensor:
    return torch.randint(VOCAB, (2, time), generator=torch.Generator().manual_seed(1))


def through(stack: Stack, x: Tensor) -> tuple[Tensor, list[int]]:
    """The stack over blocks x -> (l + 2) x + l, and the order in which they ran."""
    ran: list[int] = []

    def run(x: Tensor, layer: int) -> Tensor:
        ran.append(layer)
        return (layer + 2) * x + layer

    return stack(x, [partial(run, layer=layer) for layer in stack.order()]), ran


def test_an_output_of_the_lower_half_is_added_to_the_input_of_its_mirror_image():
    x = torch.randn(2, 3, 4)
    f = [lambda x, layer=layer: (layer + 2) * x + layer for layer in range(5)]
    u, v = 0.3, -0.7  # of the innermost skip, and of the next

    stack = UNet(Site(dim=4, depth=4))
    stack.weights.data = torch.tensor([u, v])
    y0 = f[0](x)
    y1 = f[1](y0)
    y2 = f[2](y1 + u * y1)
    assert_close(through(stack, x), (f[3](y2 + v * y0), [0, 1, 2, 3]))

    stack = UNet(Site(dim=4, depth=5))
    stack.weights.data = torch.tensor([u, v])
    y2 = f[2](y1)
    y3 = f[3](y2 + u * y1)
    assert_close(through(stack, x), (f[4](y3 + v * y0), [0, 1, 2, 3, 4]))


@pytest.mark.parametrize(("depth", "skips"), [(2, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_every_skip_has_a_weight_that_starts_at_1_and_is_used(depth: int, skips: int):
    stack = UNet(Site(dim=4, depth=depth))
    assert stack.weights.tolist() == [1.0] * skips
    through(stack, torch.ones(1, 1, 4))[0].sum().backward()
    assert stack.weights.grad.abs().min() > 0


def test_a_u_without_its_skips_is_the_sequence():
    network, plain = decoder(UNet, 5), decoder(Sequential, 5)
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if name != "stack.weights"})
    assert not torch.allclose(network(tokens()), plain(tokens()))
    nn.init.zeros_(network.stack.weights)
    assert_close(network(tokens()), plain(tokens()), **SAME)


def test_every_block_reads_a_mix_of_the_stream_and_the_embedding():
    x = torch.randn(2, 3, 4)
    stack = EmbeddingSkip(Site(dim=4, depth=3))
    assert_close(through(stack, x), through(Sequential(Site(dim=4, depth=3)), x))  # as it starts
    mix = torch.tensor([[0.5, 0.25], [-1.0, 2.0], [0.0, 1.0]])
    stack.mix.data = mix
    y = x
    for layer, (a, b) in enumerate(mix.tolist()):
        y = (layer + 2) * (a * y + b * x) + layer
    assert_close(through(stack, x), (y, [0, 1, 2]))


def test_a_depth_without_halves_and_no_rounds_are_named():
    with pytest.raises(ValueError, match=r"^depth: "):
        UNet(Site(dim=4, depth=1))
    with pytest.raises(ValueError, match=r"^times: "):
        Looped(Site(dim=4), times=0)


def test_a_loop_runs_the_whole_stack_and_then_again():
    x = torch.randn(2, 3, 4)
    once, _ = through(Sequential(Site(dim=4, depth=2)), x)
    twice, ran = through(Looped(Site(dim=4, depth=2), times=2), x)
    assert ran == [0, 1, 0, 1]
    assert_close(twice, through(Sequential(Site(dim=4, depth=2)), once)[0])


def unrolled(looped: Decoder, times: int) -> Decoder:
    """The sequence of times as many layers, each with a copy of its weights."""
    depth = len(looped.layers)
    plain = decoder(Sequential, depth * times)
    weights = {name: value for name, value in looped.state_dict().items() if not name.startswith("blocks.")}
    for layer in range(depth * times):
        weights |= {f"blocks.{layer}.{k}": v for k, v in looped.layers[layer % depth].state_dict().items()}
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_loop_is_the_sequence_of_as_many_layers_in_all_forms(times: int):
    looped = decoder(partial(Looped, times=times), 2)
    plain = unrolled(looped, times)
    assert_close(looped(tokens()), plain(tokens()), **SAME)
    states = looped.init_state(2, TIME), plain.init_state(2, TIME)
    (first, one), (second, two) = (
        network.prefill(tokens()[:, :5], state) for network, state in zip((looped, plain), states, strict=True)
    )
    assert_close(first, second, **SAME)
    assert_close(tree_leaves(one), tree_leaves(two), **SAME)
    for t in range(5, TIME):
        (first, one), (second, two) = looped.step(tokens()[:, t], one), plain.step(tokens()[:, t], two)
        assert_close(first, second, **SAME)


def test_the_gradients_of_a_loop_are_the_sums_over_its_rounds():
    looped = decoder(partial(Looped, times=3), 2)
    plain = unrolled(looped, 3)
    for network in (looped, plain):
        network(tokens()).square().sum().backward()
    for layer, block in enumerate(looped.layers):
        rounds = [dict(plain.layers[layer + 2 * r].named_parameters()) for r in range(3)]
        for name, parameter in block.named_parameters():
            assert_close(parameter.grad, sum(r[name].grad for r in rounds), rtol=1e-9, atol=1e-8)


def test_every_round_has_a_state_of_its_own():
    network = decoder(partial(Looped, times=2), 2)
    state = network.init_state(2, TIME)
    assert len(state.blocks) == 4
    with torch.no_grad():  # caches are written in place
        _, state = network.prefill(tokens(), state)
    keys = [block.mixer.key for block in state.blocks]
    assert not torch.allclose(keys[0], keys[2])
    assert not torch.allclose(keys[1], keys[3])


def test_a_loop_is_described_with_its_rounds():
    once, twice = (describe(decoder(partial(Looped, times=times), 2), TIME) for times in (1, 2))
    assert [layer.runs for layer in twice.layers] == [2, 2]
    assert twice.parameters == once.parameters
    for one, two in zip(once.layers, twice.layers, strict=True):
        assert two.state_bytes == 2 * one.state_bytes
        assert two.flops_per_token == 2 * one.flops_per_token


@pytest.mark.parametrize("mixer", [Attention, ValueResidualAttention])
@pytest.mark.parametrize("stack", [Sequential, UNet, EmbeddingSkip, partial(Looped, times=2)])
def test_gradient_checkpointing_of_any_wiring_changes_no_bit(stack: Any, mixer: Any):
    """What the second round leaves in the context is not what a block of the first round read."""
    plain, checkpointed = decoder(stack, 3, mixer), decoder(stack, 3, mixer)
    checkpointed.enable_gradient_checkpointing()
    for network in (plain, checkpointed):
        network(tokens()).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("block", [PreNormBlock, HyperConnectionBlock])
@pytest.mark.parametrize("stack", [UNet, partial(Looped, times=2)])
def test_wirings_and_what_crosses_layers_go_together(stack: Any, block: Any):
    report = audit_equivalence(decoder(stack, 3, ValueResidualAttention, block), TIME)
    assert not report.failing, report.summary()
