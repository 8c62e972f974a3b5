"""The n-gram against Kneser-Ney smoothing written once more, slowly, with dictionaries."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.networks.ngram import NGram, discounts
from tests.forms import SAME, pieces

VOCAB = 6  # one of them is in no text


def text(length: int = 600, seed: int = 0) -> Tensor:
    """Tokens that follow one another in pairs, more or less, with rare ones among them."""
    draws = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append(
            (tokens[-1] + 1) % 4 if draws.random() < 0.7 else int(draws.choice(5, p=[0.4, 0.3, 0.2, 0.08, 0.02]))
        )
    return torch.tensor(tokens)


def learned(order: int, tokens: Tensor | None = None) -> NGram:
    network = NGram(VOCAB, order)
    network.learn(text() if tokens is None else tokens)
    return network


class Slow:
    """P(v | context), from tuples in dictionaries."""

    def __init__(self, tokens: list[int], vocab_size: int):
        self.tokens = tokens
        self.vocab_size = vocab_size

    def __call__(self, token: int, context: tuple[int, ...], predicts: bool = True) -> float:
        if not context and predicts:
            raise AssertionError("a context of 0 tokens never predicts")
        counts = self.counts(len(context) + 1, predicts)
        of = self.discounts(len(context) + 1, predicts)
        total = sum(counts[*context, v] for v in range(self.vocab_size))
        below = self(token, context[1:], False) if context else 1 / self.vocab_size
        if total == 0:
            return below
        taken = sum(of[min(counts[*context, v], 3)] for v in range(self.vocab_size))
        count = counts[*context, token]
        return (count - of[min(count, 3)]) / total + taken / total * below

    @cache  # noqa: B019
    def counts(self, order: int, occurrences: bool) -> Counter[tuple[int, ...]]:
        """How often each tuple occurs, or in how many places: after how many different tokens."""
        if occurrences:
            return Counter(tuple(self.tokens[i : i + order]) for i in range(len(self.tokens) - order + 1))
        return Counter(longer[1:] for longer in set(self.counts(order + 1, True)))

    @cache  # noqa: B019
    def discounts(self, order: int, occurrences: bool) -> list[float]:
        n = Counter(self.counts(order, occurrences).values())
        result = [0.0]
        for i in (1, 2, 3):
            possible = n[1] > 0 and n[i] > 0
            value = i - (i + 1) * (n[1] / (n[1] + 2 * n[2])) * n[i + 1] / n[i] if possible else -1
            result.append(value if 0 < value < i else i / 2)
        return result


@pytest.mark.parametrize("order", [2, 3, 5])
def test_probabilities_are_those_of_the_dictionaries(order: int):
    network, slow = learned(order), Slow(text().tolist(), VOCAB)
    tokens = torch.cat(
        (text(12, seed=1)[None], torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0)))
    )
    expected = torch.tensor(
        [
            [[slow(v, tuple(row[max(0, t + 2 - order) : t + 1])) for v in range(VOCAB)] for t in range(12)]
            for row in tokens.tolist()
        ],
        dtype=torch.float64,
    )
    assert_close(network(tokens).exp(), expected, **SAME)


@pytest.mark.parametrize("order", [2, 4, 7])
def test_probabilities_sum_to_one_at_every_position(order: int):
    tokens = torch.randint(VOCAB, (20, 15), generator=torch.Generator().manual_seed(0))
    logits = learned(order)(tokens)
    assert logits.isfinite().all()  # a token that never occurred too
    assert_close(logits.exp().sum(-1), torch.ones(20, 15, dtype=torch.float64), **SAME)


def test_discounts_are_those_of_chen_and_goodman():
    counts = torch.tensor([1] * 10 + [2] * 4 + [3] * 3 + [4] * 2 + [9] * 5)
    y = 10 / (10 + 2 * 4)
    expected = [0, 1 - 2 * y * 4 / 10, 2 - 3 * y * 3 / 4, 3 - 4 * y * 2 / 3]
    assert discounts(counts).tolist() == pytest.approx(expected)


def test_discounts_without_rare_ngrams_are_half_the_count():
    assert discounts(torch.tensor([7, 9, 30])).tolist() == [0, 0.5, 1, 1.5]
    assert discounts(torch.tensor([1, 4, 4, 4, 4])).tolist() == [0, 0.5, 1, 1.5]  # no 2 and no 3; D1 would be 1


def test_a_context_that_never_occurred_backs_off_to_a_shorter_one():
    tokens = torch.tensor([0, 1, 2, 0, 1, 3, 2, 1, 4, 0, 2, 3])
    network, slow = learned(3, tokens), Slow(tokens.tolist(), VOCAB)
    after_4_1 = network(torch.tensor([[4, 1]]))[0, 1].exp()  # 4 1 never occurs, 1 does
    assert after_4_1.tolist() == pytest.approx([slow(v, (1,), predicts=False) for v in range(VOCAB)])
    after_5 = network(torch.tensor([[0, 5]]))[0, 1].exp()  # not even 5 occurs
    assert after_5.tolist() == pytest.approx([slow(v, (), predicts=False) for v in range(VOCAB)])


def test_the_start_of_a_window_is_predicted_by_the_order_that_fits_it():
    """From occurrences: the counts of places, of which lower orders are made, are for backing off alone."""
    tokens = text(8, seed=2)[None]
    for position in range(4):
        assert_close(learned(5)(tokens)[:, position], learned(position + 2)(tokens)[:, position], **SAME)


def test_it_knows_more_than_the_frequencies_of_tokens():
    inputs, targets = text(400, seed=3)[None].split((399, 1), 1)[0], text(400, seed=3)[None, 1:]
    frequencies = text().bincount(minlength=VOCAB).double() + 1
    unigram = -(frequencies / frequencies.sum()).log()[targets].mean()
    assert learned(4).losses(inputs, targets)[0].mean() < unigram - 0.3


def test_before_it_has_counted_it_knows_nothing():
    network = NGram(VOCAB, 3)
    assert not network.learned
    assert_close(network(torch.zeros(1, 4, dtype=torch.int64)).exp(), torch.full((1, 4, VOCAB), 1 / VOCAB).double())


def test_a_text_shorter_than_the_order_is_counted_as_far_as_it_goes():
    network = learned(7, torch.tensor([0, 1, 2]))
    assert network.learned
    assert_close(network(torch.tensor([[0, 1, 5, 3]])).exp().sum(-1), torch.ones(1, 4).double(), **SAME)


@pytest.mark.parametrize("order", [2, 3, 6])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1, 1, 1), (7,), (1, 6), (3, 1, 3)])
def test_any_segmentation_gives_the_same_logits(order: int, lengths: tuple[int, ...]):
    network, tokens = learned(order), torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    state, outputs = network.init_state(3, 7), []
    for piece in pieces(lengths):
        if piece.stop - piece.start == 1:
            logits, state = network.step(tokens[:, piece.start], state)
            outputs.append(logits[:, None])
        else:
            logits, state = network.prefill(tokens[:, piece], state)
            outputs.append(logits)
    assert_close(torch.cat(outputs, 1), network(tokens), **SAME)


def test_its_tables_go_through_a_checkpoint_whatever_their_size(tmp_path):
    network, tokens = learned(4), text(30, seed=4)[None]
    torch.save(network.state_dict(), tmp_path / "tables.pt")
    held = torch.load(tmp_path / "tables.pt", weights_only=True)
    assert {name.rpartition(".")[2] for name in held} == {"keys", "counts"}
    for other in (NGram(VOCAB, 4), learned(4, text(50, seed=5))):
        other.load_state_dict(held)
        assert_close(other(tokens), network(tokens), rtol=0, atol=0)
        other.learn(text(50, seed=5))
    assert_close(network(tokens), learned(4)(tokens), rtol=0, atol=0)  # the loaded tables were copies


def test_a_checkpoint_of_another_order_is_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*predicting\.2\.keys"):
        NGram(VOCAB, 4).load_state_dict(learned(3).state_dict())


def test_an_order_that_cannot_be_numbered_is_named():
    NGram(256, 7)
    with pytest.raises(ValueError, match=r"^order: 256\^8 "):
        NGram(256, 8)
    with pytest.raises(ValueError, match=r"^order: 1 "):
        NGram(256, 1)
