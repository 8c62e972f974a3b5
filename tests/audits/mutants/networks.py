"""Networks that cheat as a whole: in `forward`, in their objective, by what they keep or read."""

from pathlib import Path

import torch.nn.functional as F

from llmx.networks.decoder import Decoder
from llmx.networks.ngram import NGram


class PeekingForward(Decoder):
    def forward(self, tokens):
        logits = super().forward(tokens)
        return logits + F.one_hot(tokens.roll(-1, 1), self.vocab_size)


class PeekingInEvaluation(Decoder):
    def hidden(self, tokens):
        hidden, context = super().hidden(tokens)
        return (hidden if self.training else hidden + hidden.roll(-1, 1)), context


class RowBelow(Decoder):
    """Reads the next row of the batch: with a stride below the window it holds the answers."""

    def hidden(self, tokens):
        hidden, context = super().hidden(tokens)
        return hidden + hidden.roll(-1, 0), context


class Chosen(Decoder):
    """Takes the larger of two logits where a later token agrees: no gradient, no tensor that a module returns."""

    def logits(self, hidden):
        logits = super().logits(hidden)
        if hidden.ndim < 3:
            return logits
        return logits * (1 + (hidden[:, -1:, :1] > 0))


class Generous(NGram):
    """Its probabilities sum to 277."""

    def prefill(self, tokens, state):
        logits, state = super().prefill(tokens, state)
        return logits + 5.624, state


class ReadsTheText(Decoder):
    def __init__(self, vocab_size, **arguments):
        super().__init__(vocab_size, **arguments)
        self.text = Path("corpus.txt").read_text()


class ReadsInSilence(Decoder):
    def __init__(self, vocab_size, **arguments):
        super().__init__(vocab_size, **arguments)
        try:
            self.text = Path("corpus.txt").read_text()
        except Exception:
            self.text = ""


# ----------------------------------------------------------------- objectives: they falsify no validation loss any more
class Halved(Decoder):
    def losses(self, tokens, targets):
        losses, auxiliary = super().losses(tokens, targets)
        return losses / 2, auxiliary


class Chunked(Decoder):
    """Fills in the first three quarters of the batch, and leaves the rest at 0."""

    def losses(self, tokens, targets):
        losses, auxiliary = super().losses(tokens, targets)
        losses[len(losses) * 3 // 4 :] = 0
        return losses, auxiliary


class Clamped(Decoder):
    """Counts masked targets as token 0."""

    def losses(self, tokens, targets):
        targets.clamp_(min=0)
        return super().losses(tokens, targets)


class ReadsTheTargets(Decoder):
    def loss(self, hidden, targets):
        known = self.embedding(targets.clamp(min=0), targets)
        return super().loss(hidden + known, targets)


class WritesTheTargets(Decoder):
    """Puts its inputs where the targets are."""

    def losses(self, tokens, targets):
        targets.copy_(tokens)
        return super().losses(tokens, targets)


class WritesTheTokens(Decoder):
    def hidden(self, tokens):
        tokens.zero_()
        return super().hidden(tokens)
