import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.audits.hidden_future import hidden_future_loss
from llmx.errors import UserError
from llmx.protocol import Context, Network

VOCAB, DIM, WINDOW = 5, 8, 6
UNIGRAM = np.full(VOCAB, 1 / VOCAB)


class Running(Network):
    """Causal: the mean of the embeddings so far."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = VOCAB
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(DIM, VOCAB)
        self.lengths: set[int] = set()

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Context]:
        self.lengths.add(tokens.shape[1])
        x = self.embedding(tokens)
        count = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.dropout(x.cumsum(1) / count), Context(tokens, count.T - 1, x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class Copier(Running):
    """Looks at the very token it has to predict."""

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Context]:
        return F.one_hot(tokens.roll(-1, 1), VOCAB).float(), super().hidden(tokens)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        return 10 * hidden


def some_tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, length).astype(np.uint8)


def ordinary_loss(network: Network, tokens: np.ndarray) -> float:
    """Windows cut once, the last one ragged, in evaluation."""
    network.eval()
    ids, total = torch.as_tensor(tokens.astype(np.int64)), 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        piece = ids[start : start + WINDOW + 1]
        total += network.losses(piece[None, :-1], piece[None, 1:])[0].sum().item()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("length", [2, WINDOW, WINDOW + 1, 4 * WINDOW, 4 * WINDOW + 3])
def test_the_loss_of_a_causal_network_is_the_ordinary_loss(length):
    torch.manual_seed(0)
    network, tokens = Running(), some_tokens(length)
    result = hidden_future_loss(network, tokens, UNIGRAM, WINDOW, draws=2, batch_tokens=40)
    assert result.loss == pytest.approx(ordinary_loss(network, tokens), rel=1e-6)  # float32 logits
    assert result.spread == pytest.approx(0, abs=1e-6)
    assert (result.predictions, result.draws) == (length - 1, 2)


def test_a_network_that_copies_the_next_token_loses_its_advantage():
    # it is sure of one token: a loss of 2e-4 if that is the target, else of 10; a random token is with probability 1/5
    tokens = some_tokens(3001)
    assert ordinary_loss(Copier(), tokens) < 2  # blind at the last position of a window alone
    result = hidden_future_loss(Copier(), tokens, UNIGRAM, WINDOW)
    assert result.loss == pytest.approx(8, abs=0.2)  # 5 standard deviations of the mean of 12,000 predictions
    assert 0 < result.spread < 0.3


def test_futures_are_drawn_from_the_unigram_distribution():
    tokens = np.full(601, 3)
    only_three = np.eye(VOCAB)[3]
    assert hidden_future_loss(Copier(), tokens, only_three, WINDOW).loss < 1e-3
    never_three = np.ones(VOCAB) - only_three
    inner = 10 * (1 - 1 / WINDOW)  # the last position of a window wraps round to a known token
    assert hidden_future_loss(Copier(), tokens, never_three, WINDOW).loss == pytest.approx(inner, abs=1e-2)


def test_the_network_always_sees_full_windows():
    network = Running()
    hidden_future_loss(network, some_tokens(WINDOW + 3), UNIGRAM, WINDOW, draws=1)
    assert network.lengths == {WINDOW}


def test_the_result_is_a_function_of_the_seed_and_leaves_the_random_state_alone():
    tokens, network = some_tokens(100), Copier()
    state = torch.get_rng_state()
    first, second, other = (hidden_future_loss(network, tokens, UNIGRAM, WINDOW, seed=seed) for seed in (3, 3, 4))
    assert first == second
    assert first.loss != other.loss
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_of_all_modules_are_restored():
    network = Running()
    network.head.eval()
    hidden_future_loss(network, some_tokens(20), UNIGRAM, WINDOW)
    assert network.training
    assert network.dropout.training
    assert not network.head.training


def test_a_memory_map_is_as_good_as_a_tensor(tmp_path):
    tokens = some_tokens(50)
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    torch.manual_seed(0)
    network = Running()
    counts = torch.tensor([3, 1, 0, 2, 5])
    assert hidden_future_loss(network, mapped, counts, WINDOW) == hidden_future_loss(
        network, torch.as_tensor(tokens), counts / counts.sum(), WINDOW
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"tokens": some_tokens(1)}, "data.split"),
        ({"window": 0}, "data.window"),
        ({"draws": 0}, "draws"),
        ({"unigram": np.ones(VOCAB + 1)}, "unigram"),
        ({"unigram": np.zeros(VOCAB)}, "unigram"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_names_it(change, names):
    arguments = {"tokens": some_tokens(20), "unigram": UNIGRAM, "window": WINDOW, **change}
    with pytest.raises(UserError, match=names):
        hidden_future_loss(Running(), **arguments)
