"""The n-gram with modified interpolated Kneser-Ney smoothing: the baseline that any trained network has to beat.

    P_k(v | c) = (N(c v) - D(N(c v)))+ / sum_w N(c w) + backoff(c) P_{k-1}(v | c without its oldest token)
    backoff(c) = sum_w D(N(c w)) / sum_w N(c w)          the discounts' share; 1 for an unseen context
    D_i = i - (i + 1) Y n_{i+1} / n_i for i = 1, 2, 3+,  Y = n_1 / (n_1 + 2 n_2),  n_i = number of entries with N = i

down to P_0 = 1 / V (Kneser & Ney 1995; Chen & Goodman 1998, TR-10-98). The order that predicts counts the occurrences
N(c v). The orders below it count how many different tokens precede c v. Counting sorts the text once an order, in
O(n L log L). A prediction is a binary search an order, so T predictions take time O(T n (log L + V)). The state is the
last n - 2 tokens. The trap: at the start of a window the context is shorter, and the order that fits it predicts. There
it has to read occurrences, not the counts of preceding tokens, which serve backing off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.protocol import Context, CountingNetwork, Hidden, Logits, Tokens


class NGramState(NamedTuple):
    past: Tensor  # (B, n - 2) int64, the last tokens
    position: Tensor  # (B,) int64, tokens seen


class NGram(CountingNetwork[NGramState]):
    """Tokens (B, T) -> log-probabilities (B, T, V) in float64, from the last n - 1 tokens at each position.

    Args:
        order: n, tokens of the longest n-gram, the predicted one among them; at least 2, and V^n fits into 64 bits.
    """

    stateful = True
    normalized = True

    def __init__(self, vocab_size: int, order: int = 7):
        super().__init__()
        if order < 2:
            raise ValueError(f"order: {order} leaves no context; give at least 2")
        if vocab_size**order > 2**63:
            raise ValueError(f"order: {vocab_size}^{order} n-grams of {vocab_size} tokens do not fit into 64 bits")
        self.vocab_size = vocab_size
        self.order = order
        self.predicting = nn.ModuleList(Level(vocab_size) for _ in range(2, order + 1))  # orders 2 to n
        self.backing = nn.ModuleList(Level(vocab_size) for _ in range(1, order))  # orders 1 to n - 1

    def learn(self, tokens: Tensor) -> None:
        numbers = tokens  # the n-gram that starts at each token, as a number in base V whose last token is lowest
        for order, predicting, backing in self._levels():
            unit = self.vocab_size ** (order - 1)
            numbers = tokens[: max(0, len(numbers) - 1)] * unit + numbers[1:]
            distinct, occurrences = numbers.unique(return_counts=True)
            predicting.fill(distinct, occurrences)
            backing.fill(*(distinct % unit).unique(return_counts=True))

    @property
    def learned(self) -> bool:
        return len(self._first.keys) > 0

    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        """The log-probabilities: there is no head."""
        logits, _ = self.prefill(tokens, self.init_state(*tokens.shape))
        return logits, Context(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], logits)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def init_state(self, batch_size: int, max_length: int) -> NGramState:
        zeros = self._first.keys.new_zeros(batch_size, self.order - 1)
        return NGramState(zeros[:, 1:], zeros[:, 0])

    def step(self, tokens: Tensor, state: NGramState) -> tuple[Tensor, NGramState]:
        logits, state = self.prefill(tokens[:, None], state)
        return logits[:, 0], state

    def prefill(self, tokens: Tokens, state: NGramState) -> tuple[Logits, NGramState]:
        batch, time = tokens.shape
        text = torch.cat((state.past, tokens), 1)  # (B, n - 2 + T)
        seen = state.position[:, None] + torch.arange(1, time + 1, device=tokens.device)  # (B, T) tokens so far
        longest = seen.clamp(max=self.order - 1) + 1  # the order that fits
        context = torch.zeros_like(tokens)
        below = self._first.weights.new_full((batch, time, self.vocab_size), 1 / self.vocab_size)
        result = below
        for order, predicting, backing in self._levels():
            below = backing(context, below)  # of order - 1
            oldest = text[:, self.order - order : self.order - order + time]
            context = context + oldest * self.vocab_size ** (order - 2)
            result = torch.where((longest == order)[..., None], predicting(context, below), result)
        return result.log(), NGramState(text[:, time:], state.position + time)

    @property
    def _first(self) -> Level:
        return cast(Level, self.predicting[0])

    def _levels(self) -> Iterator[tuple[int, Level, Level]]:
        """Yields every order from 2 on, its level that predicts, and the level below for backing off."""
        for order, (predicting, backing) in enumerate(zip(self.predicting, self.backing, strict=True), 2):
            yield order, cast(Level, predicting), cast(Level, backing)


class Level(nn.Module):
    """One order: its counted n-grams, which turn the probabilities of the order below into its own.

    A checkpoint holds `keys` and `counts` alone. The other tables follow from them, and their size from the text.
    """

    keys: Tensor  # (N,) int64, sorted: number of the context * V + token
    counts: Tensor  # (N,) int64
    contexts: Tensor  # (C + 1,) int64, sorted; the last stands for all unseen contexts
    bounds: Tensor  # (C + 2,) int64, where the successors of each context begin and end
    successors: Tensor  # (N + V,) int64, tokens; padded by V, so that a row of V can always be read
    weights: Tensor  # (N + V,) float64, the discounted share of each successor
    backoff: Tensor  # (C + 1,) float64

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        for name in ("keys", "counts"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        for name in ("contexts", "bounds", "successors", "weights", "backoff"):
            self.register_buffer(name, None, persistent=False)
        self.fill(self.keys, self.counts)

    def fill(self, keys: Tensor, counts: Tensor) -> None:
        """Takes n-grams (N,), sorted, and their counts (N,)."""
        self.keys, self.counts = keys, counts
        contexts, sizes = (keys // self.vocab_size).unique_consecutive(return_counts=True)
        never = keys.new_full((1,), torch.iinfo(torch.int64).max)
        self.contexts = torch.cat((contexts, never))
        self.bounds = F.pad(torch.cat((sizes.cumsum(0), keys.new_tensor([len(keys)]))), (1, 0))
        self.successors = F.pad(keys % self.vocab_size, (0, self.vocab_size))
        taken = discounts(counts)[counts.clamp(max=3)]  # (N,)
        row = torch.arange(len(contexts), device=keys.device).repeat_interleave(sizes)  # of each n-gram's context
        total = taken.new_zeros(len(contexts)).index_add(0, row, counts.to(taken.dtype))
        self.weights = F.pad((counts - taken) / total[row], (0, self.vocab_size))
        self.backoff = F.pad(torch.zeros_like(total).index_add(0, row, taken) / total, (0, 1), value=1.0)

    def forward(self, context: Tensor, below: Tensor) -> Tensor:
        """Numbers of contexts (B, T), probabilities of the order below (B, T, V) -> probabilities (B, T, V)."""
        place = torch.searchsorted(self.contexts, context)
        place = torch.where(self.contexts[place] == context, place, len(self.contexts) - 1)
        entries = self.bounds[place][..., None] + torch.arange(self.vocab_size, device=context.device)  # (B, T, V)
        weights = self.weights[entries].masked_fill(entries >= self.bounds[place + 1][..., None], 0)
        return (self.backoff[place][..., None] * below).scatter_add(-1, self.successors[entries], weights)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        held = [state_dict[name] for name in (prefix + "keys", prefix + "counts") if name in state_dict]
        if len(held) == 2:  # else torch reports the missing key
            self.fill(*(table.to(self.keys.device, copy=True) for table in held))
        super()._load_from_state_dict(state_dict, prefix, *args)


def discounts(counts: Tensor) -> Tensor:
    """The discounts on counts of 0, 1, 2, and 3 or more: (N,) int64 -> (4,) float64.

    The formula needs n-grams that occur once, twice, three and four times. If it gives no number between 0 and the
    count, as for the few and frequent single characters, the discount is half the count.
    """
    n = [(counts == i).sum().item() for i in range(5)]
    taken = [0.0]
    for i in (1, 2, 3):
        estimate = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i] if n[1] and n[i] else 0.0
        taken.append(estimate if 0 < estimate < i else i / 2)
    return torch.tensor(taken, dtype=torch.float64, device=counts.device)
