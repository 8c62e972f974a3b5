"""The honest loss of a network that may look ahead: the loss with its future hidden.

For every predicted token, all later tokens of the window are replaced by independent draws from the unigram
distribution of the training split. They carry no information, and still look to the network like its training text. A
causal network does not notice: its loss is the ordinary one. Every prediction needs a window of its own, so each draw
takes as much time as O(W) forwards of the split.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from llmx.errors import UserError
from llmx.protocol import Network


class HiddenFutureLoss(NamedTuple):
    """What hidden_future_loss measured."""

    loss: float  # nats a token, mean over the draws
    spread: float  # their standard deviation
    draws: int
    predictions: int  # tokens counted


def hidden_future_loss(
    network: Network,
    tokens: np.ndarray | Tensor,
    unigram: ArrayLike | Tensor,
    window: int,
    draws: int = 4,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> HiddenFutureLoss:
    """Evaluates a split with the future hidden: each of its L - 1 predictable tokens once, in disjoint windows.

    The network, leaking or not, runs on its own device in evaluation mode, always at the full window. Its mode is
    restored. `tokens` (L,) is the whole split; `unigram` (V,) holds probabilities or counts of the tokens in the
    training split. Each prediction draws `draws` futures, with this seed. One forward has `batch_tokens`; more do not
    fit in a processor's cache. Raises UserError if nothing is left to measure, or `unigram` is no distribution.
    """
    weights = torch.as_tensor(unigram, dtype=torch.float64, device="cpu")
    if weights.shape != (network.vocab_size,) or not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
        raise UserError(f"unigram: give one probability or count for each of the {network.vocab_size} tokens")
    if len(tokens) < 2:
        raise UserError(f"data.split: a split of {len(tokens)} tokens has nothing to predict; give it at least 2")
    for name, value in (("data.window", window), ("draws", draws)):
        if value < 1:
            raise UserError(f"{name}: {value} is below 1")
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    predictions = len(tokens) - 1
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            totals = torch.zeros(draws, dtype=torch.float64)
            for known in torch.arange(predictions).split(max(1, batch_tokens // window)):  # (R,), the last token seen
                position = known % window  # in its window
                index = (known - position)[:, None] + torch.arange(window)  # (R, W)
                rows = _take(tokens, index.clamp_max(predictions))
                later = index > known[:, None]
                targets = _take(tokens, known + 1).to(device)
                for draw in range(draws):
                    future = torch.multinomial(weights, rows.numel(), True, generator=generator).view_as(rows)
                    hidden = network.hidden(torch.where(later, future, rows).to(device))[0]
                    logits = network.logits(hidden[torch.arange(len(rows)), position])  # (R, V)
                    totals[draw] += F.cross_entropy(logits.float(), targets, reduction="none").double().sum().cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode
    losses = totals / predictions
    return HiddenFutureLoss(losses.mean().item(), losses.std(correction=int(draws > 1)).item(), draws, predictions)


def _take(tokens: np.ndarray | Tensor, index: Tensor) -> Tensor:
    """tokens[index], in int64; the tokens may be a memory map."""
    return torch.as_tensor(np.asarray(tokens)[index.numpy()].astype(np.int64))
