"""The head of several tokens: the loss it adds in training, its targets, and what evaluation sees of it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.networks.heads import LinearHead
from llmx.networks.multi_token import MultiTokenHead
from llmx.protocol import IGNORE, Head
from tests.forms import SAME, perturbed

VOCAB = 11
BLOCK = partial(PreNormBlock, mixer=partial(Attention, heads=2), feed_forward=partial(SwiGLU, hidden=12))


def decoder(head: type[Head] | partial[Head] = MultiTokenHead) -> Decoder:
    return perturbed(Decoder(VOCAB, BLOCK, dim=8, depth=2, head=head))


def text(rows: int = 4, time: int = 10) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, time + 1), generator=torch.Generator().manual_seed(5))


def auxiliary(network: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return network.train().losses(tokens[:, :-1], tokens[:, 1:])[1]


def test_the_added_loss_is_that_of_the_tokens_after_the_next_one_as_far_as_the_window_has_them():
    network, tokens = decoder(partial(MultiTokenHead, tokens=3, weight=0.5)), text()
    hidden, head = network.hidden(tokens[:, :-1])[0], network.head
    expected = torch.zeros((), dtype=torch.float64)
    for k, matrix in enumerate(head.further.weight.chunk(2), 1):
        layer = hidden + F.silu(hidden @ matrix.T)
        logits = (layer @ head.linear.weight.T)[:, :-k]  # at t for the token at t + 1 + k
        expected += F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1 + k :].flatten())
    assert_close(auxiliary(network, tokens), (0.5 * expected).float())


def test_training_alone_has_it_and_the_loss_of_the_next_token_stays_what_it_was():
    network, plain, tokens = decoder(), decoder(LinearHead), text()
    weights = network.state_dict()
    del weights["head.further.weight"]
    plain.load_state_dict(weights)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(network(inputs), plain(inputs))
    for training in (False, True):
        losses, added = network.train(training).losses(inputs, targets)
        assert torch.equal(losses, plain.losses(inputs, targets)[0])
        assert (added > 0) == training


def test_the_first_of_the_logits_ahead_are_the_ordinary_ones():
    network = decoder()
    hidden = network.hidden(text())[0]
    ahead = network.head.ahead(hidden)
    assert ahead.shape == (4, 11, 4, VOCAB)
    assert_close(ahead[:, :, 0], network.head(hidden), **SAME)
    plain = LinearHead(8, VOCAB).double()
    assert torch.equal(plain.ahead(hidden)[:, :, 0], plain(hidden))


def test_ignored_targets_count_nowhere():
    network, tokens = decoder().train(), text()
    targets = tokens[:, 1:].clone()
    targets[2:] = IGNORE  # as in rows that fill up a batch
    halved = network.losses(tokens[:, :-1], targets)[1]
    assert_close(halved, auxiliary(network, tokens[:2]))
    assert network.losses(tokens[:, :-1], torch.full_like(targets, IGNORE))[1] == 0


@pytest.mark.parametrize("time", [1, 2, 3])
def test_a_window_shorter_than_the_outlook_has_the_losses_it_can_have(time: int):
    added = auxiliary(decoder(), text(time=time))
    assert added.isfinite()
    assert (added > 0) == (time > 1)


def test_parts_of_a_batch_have_the_gradients_of_the_whole():
    whole, tokens = decoder(), text()
    parts = copy.deepcopy(whole)
    auxiliary(whole, tokens).backward()
    for half in tokens.split(2):
        (auxiliary(parts, half) / 2).backward()
    for name, parameter in whole.named_parameters():
        assert_close(parts.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_checkpointing_changes_no_bit():
    plain, tokens = decoder(), text()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    for network in (plain, checkpointed):
        auxiliary(network, tokens).backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_tied_head_reads_all_tokens_with_the_embedding():
    network = Decoder(VOCAB, BLOCK, dim=8, depth=2, head=MultiTokenHead, tied=True)
    assert network.head.linear.weight is network.embedding.weight


@pytest.mark.parametrize(("name", "value"), [("tokens", 1), ("weight", 0.0), ("weight", float("nan"))])
def test_a_value_out_of_range_is_named(name: str, value: float):
    with pytest.raises(ValueError, match=f"^{name}: "):
        MultiTokenHead(8, VOCAB, **{name: value})
