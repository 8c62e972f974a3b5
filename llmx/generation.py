"""Generation by prefill and step.

Policy at the end of the window: no network is asked about more positions than it was trained on. When the context has
grown to the window, its last half is read again in one prefill and decoding goes on from there, so that each new
character sees between half a window and a whole window of text. A prompt longer than the window counts with its end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmx.protocol import Network, State
from llmx.shapes import Tokens

Step = Callable[[Tensor, State], tuple[Tensor, State]]  # Network.step


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        max_new_tokens: tokens to generate for each prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens.
        top_p: only the smallest set of tokens that holds this probability (arXiv 1904.09751).
        min_p: only tokens with at least this share of the highest probability (arXiv 2407.01082).
        seed: of the draws; the same seed and prompts give the same text.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is below 0")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} is not a finite number from 0 on")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} is below 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: {self.min_p} is not in [0, 1]")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draws one token a row: logits (B, V) -> (B,) int64. The cuts apply one after the other, top_k first."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # differences to the highest: a tiny temperature then gives -inf and never inf
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k is not None:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # what stands before it holds enough already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        low = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(low, float("-inf"))
    # argmax of logits + Gumbel noise is a draw from the softmax, and cheaper than multinomial
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log()).argmax(-1)


@torch.no_grad()
def generate(network: Network, prompts: Tokens, window: int, sampling: Sampling, step: Step | None = None) -> Tokens:
    """Continues prompts (B, T), T >= 1, by `sampling.max_new_tokens` tokens: (B, max_new_tokens).

    A network without a state recomputes its context for every token. The network's training mode is left as it was.
    `step` stands in for `network.step`, for instance compiled.
    """
    was_training = network.training
    network.eval()
    try:
        generator = torch.Generator(prompts.device).manual_seed(sampling.seed)
        decoder = _Stepping(network, step or network.step) if network.stateful else _Recomputing(network)
        text = prompts.new_empty(prompts.shape[0], prompts.shape[1] + sampling.max_new_tokens)
        text[:, : prompts.shape[1]] = prompts
        begin = max(0, prompts.shape[1] - window)  # where the context starts in the text
        for end in range(prompts.shape[1], text.shape[1]):
            if end - begin > window:
                begin = end - max(1, window // 2)
                decoder.forget()
            text[:, end] = choose(decoder.logits(text[:, begin:end], window), sampling, generator)
        return text[:, prompts.shape[1] :]
    finally:
        network.train(was_training)


class _Stepping:
    """Reads a context in one prefill, then one token at a time."""

    def __init__(self, network: Network, step: Step):
        self.network = network
        self.step = step
        self.state: State | None = None

    def forget(self) -> None:
        self.state = None

    def logits(self, context: Tokens, window: int) -> Tensor:
        if self.state is None:
            logits, self.state = self.network.prefill(context, self.network.init_state(context.shape[0], window))
            return logits[:, -1]
        logits, self.state = self.step(context[:, -1], self.state)
        return logits


class _Recomputing:
    """Reads the whole context again for every token."""

    def __init__(self, network: Network):
        self.network = network

    def forget(self) -> None:
        pass

    def logits(self, context: Tokens, window: int) -> Tensor:
        return self.network(context)[:, -1]
