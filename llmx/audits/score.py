"""The score: the lab computes the loss of a split, from the logits of a network that never gets the targets.

    loss_t = log sum_v exp(l_t[v]) - l_t[x_{t+1}]     l_t (V,) the logits after token t, in float32

`Network.losses` is the objective of training and has no part in it. Where a batch has more logits than `MOST_LOGITS`,
the head runs on pieces of positions, so that memory stays bounded.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmx.errors import UserError
from llmx.networks.decoder import Decoder
from llmx.protocol import IGNORE, Logits, Losses, Network, Tokens

MOST_LOGITS = 2**26  # numbers at once, 256 MiB in float32
SUM_TOLERANCE = 1e-3  # by which probabilities may miss 1


class Score:
    """Tokens (B, T) and targets (B, T) -> losses (B, T) in nats, float32, and 0 where the target is IGNORE.

    The network, in whatever mode and precision the caller has set, gets a copy of the tokens: it cannot change what the
    lab keeps. `compiled` compiles it without the score. Raises UserError for log-probabilities that do not sum to one.
    """

    def __init__(self, network: Network, compiled: bool = False):
        self.network, self.compiled = network, compiled
        self.precision = torch.float32  # of the last logits
        # compiled are the bound methods, so that checkpoint keys stay clean
        compile = partial(torch.compile, dynamic=False) if compiled else _as_it_is
        self.forward: Any = compile(network.forward) if compiled else network
        self.hidden, self.logits = compile(network.hidden), compile(network.logits)
        self.plain = type(network).forward is Network.forward  # `forward` is `hidden` and the head

    def __call__(self, tokens: Tokens, targets: Tokens) -> Losses:
        positions = max(1, MOST_LOGITS // (len(tokens) * self.network.vocab_size))
        if positions >= tokens.shape[1] or not self.plain:
            return self.losses(self.forward(tokens.clone()), targets)
        hidden = self.hidden(tokens.clone())[0]
        pieces = zip(hidden.split(positions, 1), targets.split(positions, 1), strict=True)
        return torch.cat([self.losses(self.logits(part), answers) for part, answers in pieces], 1)

    def losses(self, logits: Logits, targets: Tokens) -> Losses:
        """Logits (B, T, V) and targets (B, T) -> losses (B, T)."""
        if logits.shape[:-1] != targets.shape:
            raise UserError(f"model.network: gives {tuple(logits.shape)} for {tuple(targets.shape)} tokens")
        if self.network.normalized:
            _check_sums(logits, type(self.network).__name__)
        self.precision = logits.dtype
        flat = logits.flatten(0, -2).float()
        losses = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view(targets.shape)


def _as_it_is(call: Any) -> Any:
    return call


def _check_sums(log_probabilities: Tensor, name: str) -> None:
    sums = log_probabilities.double().exp().sum(-1)
    away = (sums - 1).abs()
    if not away.max() <= SUM_TOLERANCE:  # NaN too
        worst = sums.flatten()[away.flatten().argmax()].item()
        raise UserError(
            f"model.network: the probabilities of {name} sum to {worst:.4g}; log-probabilities (normalized) sum to 1"
        )


def own_objective(network: Network) -> bool:
    """Whether the network may train on something else than the cross-entropy of its `forward`."""
    kind = type(network)
    losses = kind.losses in (Network.losses, Decoder.losses) and "losses" not in vars(network)
    return not losses or kind.loss is not Network.loss or kind.forward is not Network.forward
