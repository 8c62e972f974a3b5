"""A head that predicts the next n tokens at every position (arXiv 2404.19737), for training and for drafts.

    h_1 = h,  h_k = h + silu(W_k h)    h (D) the decoder's last vector, k = 2 .. n
    p(x_{t+k} | x_{<=t}) = softmax(U h_k)    U (V, D) the one unembedding
    loss = -log p(x_{t+1}) - weight sum_{k=2}^n log p(x_{t+k})

This is the paper's parallel form: each of the n predictions sees the trunk alone, and none sees another (DeepSeek-V3,
arXiv 2412.19437, chains them). W_k is a transformer layer in the paper, and linear in its appendix. Here it is the
residual layer of Medusa (arXiv 2401.10774): it reads one position, so the head has no state, and the next token's head
is plain. (n - 1) D^2 parameters. Training takes O(T n D (D + V)) operations a sequence and n logits vectors a token;
evaluation leaves the further heads out. The traps: the loss of the further tokens belongs to training, not to the
validation loss. The last k - 1 positions have no k-th target. In the paper small models get worse by it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_positive
from llmx.parts.init import normal_
from llmx.protocol import IGNORE, Head, Hidden, Tokens


class MultiTokenHead(Head):
    """(..., D) -> (..., V), the logits of the next token. `ahead` gives the logits of all n tokens, (..., n, V).

    Args:
        tokens: n, with the next one; at least 2.
        weight: factor on the further tokens' losses, positive; 1 in the paper.
    """

    def __init__(self, dim: int, vocab_size: int, tokens: int = 4, weight: float = 1.0):
        super().__init__()
        if tokens < 2:
            raise ValueError(f"tokens: {tokens} is below 2, the next token and one more")
        check_positive(weight=weight)
        self.tokens = tokens
        self.weight = weight
        self.further = nn.Linear(dim, (tokens - 1) * dim, bias=False)  # W_2 .. W_n
        self.linear = nn.Linear(dim, vocab_size, bias=False)  # U
        normal_(self.further)
        normal_(self.linear)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)

    def auxiliary(self, hidden: Hidden, targets: Tokens) -> Tensor:
        logits = self._further(hidden).flatten(0, 2).float()  # (B T (n - 1), V)
        shifted = F.pad(targets, (0, self.drafts), value=IGNORE).unfold(1, self.tokens, 1)[..., 1:]  # (B, T, n - 1)
        losses = F.cross_entropy(logits, shifted.flatten(), ignore_index=IGNORE, reduction="none")
        counted = (shifted != IGNORE).sum((0, 1))  # (n - 1,)
        return self.weight * (losses.view(-1, self.drafts).sum(0) / counted.clamp_min(1)).sum()

    @property
    def drafts(self) -> int:
        return self.tokens - 1

    def ahead(self, hidden: Tensor) -> Tensor:
        return torch.cat((self(hidden)[..., None, :], self._further(hidden)), -2)

    def _further(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., n - 1, V): the logits of the tokens after the next one."""
        added = F.silu(self.further(hidden)).unflatten(-1, (self.tokens - 1, -1))
        return self.linear(hidden[..., None, :] + added)
