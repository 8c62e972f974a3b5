"""The windowed MLP: what it sees, and that its forms are one function."""

import pytest
import torch
from torch.testing import assert_close

from llmx.networks.window_mlp import WindowMLP
from tests.forms import SAME, perturbed, pieces

VOCAB = 11


def network(context_length: int = 3, direct: bool = True) -> WindowMLP:
    torch.manual_seed(0)
    return perturbed(WindowMLP(VOCAB, context_length, dim=4, hidden=6, direct=direct))


def test_logits_are_the_papers_equation_at_every_position():
    net, tokens = network(), torch.randint(VOCAB, (2, 7))
    logits = net(tokens)
    for row in range(2):
        for t in range(7):
            vectors = [net.embedding.weight[tokens[row, s]] if s >= 0 else net.start for s in range(t - 2, t + 1)]
            x = torch.cat(vectors)
            hidden = torch.tanh(net.inner.weight @ x + net.inner.bias)
            outer, direct = net.head.weight.split((6, 12), 1)
            assert_close(logits[row, t], outer @ hidden + direct @ x + net.head.bias, **SAME)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("context_length", [1, 3, 9])
def test_it_sees_its_context_and_nothing_beyond(context_length: int, direct: bool):
    net, tokens = network(context_length, direct), torch.randint(VOCAB, (1, 12))
    base = net(tokens)
    for s in range(12):
        changed = tokens.clone()
        changed[0, s] = (tokens[0, s] + 1) % VOCAB
        moved = (net(changed) - base).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [s <= t < s + context_length for t in range(12)]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("context_length", [1, 3, 9])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1, 1), (6,), (1, 5), (3, 1, 2)])
def test_any_segmentation_gives_the_same_logits(context_length: int, direct: bool, lengths: tuple[int, ...]):
    net, tokens = network(context_length, direct), torch.randint(VOCAB, (2, 6))
    state, outputs = net.init_state(2, 6), []
    for piece in pieces(lengths):
        if piece.stop - piece.start == 1:
            logits, state = net.step(tokens[:, piece.start], state)
            outputs.append(logits[:, None])
        else:
            logits, state = net.prefill(tokens[:, piece], state)
            outputs.append(logits)
    assert_close(torch.cat(outputs, 1), net(tokens), **SAME)


@pytest.mark.parametrize("key", ["context_length", "dim", "hidden"])
def test_a_size_below_1_is_named(key: str):
    with pytest.raises(ValueError, match=rf"^{key}: 0 "):
        WindowMLP(VOCAB, **{key: 0})
