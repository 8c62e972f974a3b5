"""Hyper-connections: the paper's matrices, and where they start."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.hyper_connections import DynamicConnection, HyperConnectionBlock, first_table
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import NoNorm, RMSNorm
from llmx.protocol import Context, Site

VOCAB, DIM, TIME = 13, 16, 6
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def parts() -> dict[str, Any]:
    return {"mixer": partial(Attention, heads=4), "feed_forward": partial(SwiGLU, hidden=12)}


def decoder(depth: int, norm: Any = RMSNorm, **arguments: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        VOCAB, partial(HyperConnectionBlock, **parts(), **arguments), dim=DIM, depth=depth, norm=norm
    ).double()


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, TIME), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("depth", "streams"), [(1, 1), (1, 4), (2, 2), (3, 4), (4, 3)])
def test_at_the_start_the_network_is_the_pre_norm_one(depth: int, streams: int):
    """The stream that leaves the stack is n times the pre-norm one, in every form; the last norm takes the n away."""
    hyper = decoder(depth, NoNorm, streams=streams)
    plain = Decoder(VOCAB, partial(PreNormBlock, **parts()), dim=DIM, depth=depth, norm=NoNorm).double()
    weights = {name: value for name, value in hyper.state_dict().items() if "connection" not in name}
    for name, value in weights.items():
        nn.init.normal_(value, std=0.4)
        assert torch.equal(hyper.state_dict()[name], value)  # the two share memory
    plain.load_state_dict(weights)
    expected = streams * plain(tokens())
    assert_close(hyper(tokens()), expected, **SAME)
    first, state = hyper.prefill(tokens()[:, :4], hyper.init_state(2, TIME))
    second, state = hyper.step(tokens()[:, 4], state)
    third, _ = hyper.step(tokens()[:, 5], state)
    assert_close(torch.cat((first, second[:, None], third[:, None]), 1), expected, **SAME)

    hyper.norm, plain.norm = (RMSNorm(DIM, eps=0.0).double() for _ in range(2))
    assert_close(hyper(tokens()), plain(tokens()), **SAME)


def matrix(connection: DynamicConnection, streams: Tensor) -> Tensor:
    """The paper's (n + 1, n + 1) matrix of one position: [[0, B], [A_m, A_r]]."""
    n = len(streams)
    table = connection.table.view(n, n + 2)
    made = torch.zeros(n + 1, n + 1, dtype=streams.dtype)
    made[1:, 0], made[1:, 1:], made[0, 1:] = table[:, 0], table[:, 1:-1], table[:, -1]
    normed = streams / (streams.square().mean(1, keepdim=True) + connection.eps).sqrt()
    read, mix, write = connection.weigh.weight.split((1, n, 1))
    made[1:, 0] += connection.scale[0] * torch.tanh(normed @ read.T)[:, 0]
    made[1:, 1:] += connection.scale[0] * torch.tanh(normed @ mix.T)
    made[0, 1:] += connection.scale[1] * torch.tanh(normed @ write.T)[:, 0]
    return made


def test_a_stack_is_the_papers_matrices_at_every_position():
    n, depth = 3, 2
    network = decoder(depth, streams=n)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    context = Context(tokens(), torch.arange(TIME)[None], x)
    given, streams = x, torch.stack([x] * n, 2)  # (B, T, n, D)
    for block in network.layers:
        given = block(given, context)
        for part, norm, weights in (
            (block.mixer, block.mixer_norm, block.mixer_connection),
            (block.feed_forward, block.feed_forward_norm, block.feed_forward_connection),
        ):
            made = torch.stack(
                [torch.stack([matrix(weights, at) for at in row]) for row in streams]
            )  # (B, T, n+1, n+1)
            read = (made[..., 1:, :1] * streams).sum(2)
            output = part(norm(read), context)
            both = torch.cat((output[:, :, None], streams), 2)  # (B, T, n + 1, D)
            streams = (made.transpose(2, 3) @ both)[:, :, 1:]
    assert_close(given, streams.sum(2), **SAME)


def test_the_branches_read_the_streams_in_turn():
    network = decoder(3, streams=4)
    connections = [c for b in network.layers for c in (b.mixer_connection, b.feed_forward_connection)]
    assert [c.table.view(4, 6)[:, 0].argmax().item() for c in connections] == [0, 1, 2, 3, 0, 1]
    for k in range(9):
        table = first_table(4, k)
        assert torch.equal(table[:, 0], torch.eye(4)[k % 4])
        assert torch.equal(table[:, 1:5], torch.eye(4))
        assert torch.equal(table[:, 5], torch.ones(4))


def test_with_more_streams_than_branches_some_stay_copies_of_each_other():
    """One layer: after its mixer the feed-forward reads stream 1, and no branch is left to tell the others apart."""
    network = decoder(1, streams=4)
    for name, parameter in network.named_parameters():
        if "connection" not in name:
            nn.init.normal_(parameter, std=0.4)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        network(tokens()).square().sum().backward()
        optimizer.step()
    into = network.layers[0].mixer_connection.table.view(4, 6)[:, 1:] - first_table(4, 0)[:, 1:]
    mixed = [into[:, j].sum() for j in range(4)]  # into stream j
    assert_close(mixed[2], mixed[3], **SAME)
    assert_close(mixed[0], mixed[2], **SAME)
    assert (mixed[1] - mixed[2]).abs() > 1e-3


def test_the_table_is_flat_so_that_weight_decay_leaves_it_alone():
    assert DynamicConnection(DIM, 4, 0).table.ndim == 1


def test_the_dynamic_part_starts_at_nothing_and_is_learned():
    network = decoder(2)
    for name, parameter in network.named_parameters():
        if ".weigh." in name:
            assert not parameter.any()
    network(tokens()).square().sum().backward()
    for block in network.layers:
        assert block.mixer_connection.weigh.weight.grad.abs().max() > 0


def test_between_the_layers_there_are_n_streams():
    network, seen = decoder(3, streams=2), []
    for block in network.layers:
        block.register_forward_hook(lambda _, args, output: seen.append((args[0].shape[2:], output.shape[2:])))
    network(tokens())
    assert seen == [((DIM,), (2, DIM)), ((2, DIM), (2, DIM)), ((2, DIM), (DIM,))]


def test_no_streams_are_named():
    with pytest.raises(ValueError, match=r"^streams: "):
        HyperConnectionBlock(Site(dim=DIM), **parts(), streams=0)


def test_compiled_it_is_the_same_function():
    network = decoder(2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    torch._dynamo.reset()
    compiled = torch.compile(network.__call__, backend="eager", fullgraph=True)  # traces the form that is for compilers
    assert_close(compiled(tokens()), network(tokens()), **SAME)
