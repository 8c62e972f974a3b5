"""The neural probabilistic language model (Bengio et al. 2003, JMLR 3:1137-1155): an MLP over the last n tokens.

    x_t = [e_{t-n+1}; ...; e_t]                          embeddings of the last n tokens, n * M numbers
    logits_t = U tanh(H x_t + d) + W x_t + b             W: the direct connections, which are optional

All positions at once take time O(T (n M F + F V)) for F hidden units. Memory is O(T n M): the windows overlap, and each
has its own copy. The state is the embeddings of the last n - 1 tokens, (n - 1) M numbers a sequence. One learned vector
stands at every position before the first token. A prediction sees n tokens and no more, whatever the window of
training. The traps: windows cut at t - n .. t - 1 predict token t + 1 without its nearest neighbour. Padding on the
right instead of the left shows the future.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmx.parts.checks import check_sizes
from llmx.parts.init import normal_
from llmx.protocol import Context, Hidden, Logits, Network, Tokens


class WindowMLPState(NamedTuple):
    past: Tensor  # (B, n - 1, M), the last embeddings


class WindowMLP(Network[WindowMLPState]):
    """Tokens (B, T) -> logits (B, T, V) from the last n tokens at each position.

    Args:
        context_length: n, the tokens that a prediction sees; this and the widths are at least 1.
        dim: M, width of an embedding.
        hidden: F, units in the tanh layer.
        direct: also connects the embeddings directly to the logits.
    """

    stateful = True

    def __init__(
        self, vocab_size: int, context_length: int = 8, dim: int = 64, hidden: int = 1024, direct: bool = True
    ):
        super().__init__()
        check_sizes(context_length=context_length, dim=dim, hidden=hidden)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.direct = direct
        self.embedding = nn.Embedding(vocab_size, dim)
        self.start = nn.Parameter(torch.empty(dim).normal_())  # stands before the first token
        self.inner = nn.Linear(context_length * dim, hidden)
        self.head = nn.Linear(hidden + direct * context_length * dim, vocab_size)  # [U, W], b
        normal_(self.inner, (context_length * dim) ** -0.5)
        normal_(self.head)

    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        x = self.embedding(tokens)
        embedded = torch.cat((self.init_state(*tokens.shape).past, x), 1)
        return self._read(embedded), Context(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def init_state(self, batch_size: int, max_length: int) -> WindowMLPState:
        return WindowMLPState(self.start.expand(batch_size, self.context_length - 1, -1))

    def step(self, tokens: Tensor, state: WindowMLPState) -> tuple[Tensor, WindowMLPState]:
        window = torch.cat((state.past, self.embedding(tokens)[:, None]), 1)  # (B, n, M)
        return self.head(self._units(window.flatten(1))), WindowMLPState(window[:, 1:])

    def prefill(self, tokens: Tokens, state: WindowMLPState) -> tuple[Logits, WindowMLPState]:
        embedded = torch.cat((state.past, self.embedding(tokens)), 1)  # (B, n - 1 + T, M)
        return self.head(self._read(embedded)), WindowMLPState(embedded[:, tokens.shape[1] :])

    def _read(self, embedded: Tensor) -> Tensor:
        """Embeddings and the n - 1 before them, (B, n - 1 + T, M) -> the head's input, (B, T, F [+ n M])."""
        return self._units(embedded.unfold(1, self.context_length, 1).transpose(2, 3).flatten(2))  # oldest first

    def _units(self, x: Tensor) -> Tensor:
        """Windows (..., n M) -> the head's input, (..., F [+ n M])."""
        hidden = self.inner(x).tanh()
        return torch.cat((hidden, x), -1) if self.direct else hidden
