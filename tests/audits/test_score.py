"""The score: what the lab makes of a network's logits, whatever the network would like."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import llmx.audits.score as module
from llmx.audits.score import Score, own_objective
from llmx.errors import UserError
from llmx.networks.decoder import Decoder
from llmx.networks.multi_token import MultiTokenHead
from llmx.networks.ngram import NGram
from llmx.protocol import IGNORE
from tests.audits.networks import VOCAB, Bare, decoder

TEXT = torch.randint(VOCAB, (3, 13), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TEXT[:, :-1], TEXT[:, 1:].contiguous()


def expected(network):
    return F.cross_entropy(network(INPUTS).mT.float(), TARGETS, reduction="none")


@torch.no_grad()
def test_the_score_is_the_cross_entropy_of_the_logits_and_0_where_nothing_is_counted():
    network = decoder().eval()
    targets = TARGETS.clone()
    targets[1, 3:] = IGNORE
    losses = Score(network)(INPUTS, targets)
    assert_close(losses[targets != IGNORE], expected(network)[targets != IGNORE])
    assert not losses[targets == IGNORE].any()


@torch.no_grad()
def test_a_network_whose_own_losses_lie_is_scored_all_the_same():
    class Lying(Decoder):
        def losses(self, tokens, targets):
            raise AssertionError("the score has no use for it")

    network = decoder().eval()
    network.__class__ = Lying
    assert_close(Score(network)(INPUTS, TARGETS), expected(network))


@torch.no_grad()
def test_a_network_that_writes_into_its_tokens_does_not_reach_those_of_the_lab():
    class Writing(Bare):
        def hidden(self, tokens):
            tokens.zero_()
            return super().hidden(tokens)

    before = INPUTS.clone()
    Score(Writing())(INPUTS, TARGETS)
    assert torch.equal(INPUTS, before)


@torch.no_grad()
def test_many_logits_are_made_in_pieces_of_positions_and_scored_the_same(monkeypatch):
    network = decoder().eval()
    whole = Score(network)(INPUTS, TARGETS)
    monkeypatch.setattr(module, "MOST_LOGITS", 5 * len(INPUTS) * VOCAB)
    sizes = []
    network.head.register_forward_hook(lambda head, args, output: sizes.append(output.shape[1]))
    assert_close(Score(network)(INPUTS, TARGETS), whole)
    assert sizes == [5, 5, 2]


@torch.no_grad()
def test_logits_of_16_bits_are_scored_in_32():
    network = decoder().eval().bfloat16()
    logits = network(INPUTS)
    assert logits.dtype == torch.bfloat16
    losses = Score(network)(INPUTS, TARGETS)
    assert losses.dtype == torch.float32
    assert_close(losses, F.cross_entropy(logits.float().mT, TARGETS, reduction="none"), rtol=0, atol=0)


@torch.no_grad()
def test_log_probabilities_have_to_sum_to_one():
    network = NGram(VOCAB, 3)
    network.learn(TEXT.flatten())
    assert_close(Score(network)(INPUTS, TARGETS), expected(network))

    class Generous(NGram):
        def prefill(self, tokens, state):
            logits, state = super().prefill(tokens, state)
            return logits + torch.tensor(277.0).log(), state

    network.__class__ = Generous
    with pytest.raises(UserError, match="the probabilities of Generous sum to 277"):
        Score(network)(INPUTS, TARGETS)


def test_logits_of_another_shape_are_refused():
    class Short(Bare):
        def logits(self, hidden):
            return hidden[:, 1:]

    with pytest.raises(UserError, match=r"model.network: gives \(3, 11, 7\) for \(3, 12\) tokens"):
        Score(Short())(INPUTS, TARGETS)


def test_only_a_network_that_overrides_it_has_an_objective_of_its_own():
    class Smoothed(Decoder):
        def loss(self, hidden, targets):
            return F.cross_entropy(self.logits(hidden).mT, targets, label_smoothing=0.1, reduction="none")

    class Halved(Bare):
        def losses(self, tokens, targets):
            losses, auxiliary = super().losses(tokens, targets)
            return losses / 2, auxiliary

    class Otherwise(Bare):
        def forward(self, tokens):
            return 2 * super().forward(tokens)

    smoothed, patched = decoder(), decoder()
    smoothed.__class__ = Smoothed
    patched.losses = lambda tokens, targets: None
    assert all(own_objective(network) for network in (smoothed, patched, Halved(), Otherwise()))
    heads = [decoder(), decoder(head=partial(MultiTokenHead, tokens=2)), Bare(), NGram(VOCAB, 3)]
    assert not any(own_objective(network) for network in heads)
