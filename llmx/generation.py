"""Generation by prefill and step.

Policy at the end of the window: no network is asked about more positions than it was trained on. When the context has
grown to the window, its last half is read again in one prefill and decoding goes on from there, so that each new
character sees between half a window and a whole window of text. A prompt longer than the window counts with its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmx.protocol import Network, State
from llmx.shapes import Tokens

AT_ONCE = 4  # tokens that one call of a compiled `decode` takes: more pays little and compiles for long


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


Decode = Callable[[Network, Tensor, State, Sampling, Sequence[Tensor]], tuple[Tokens, State]]


def choose(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Takes one token a row: logits (B, V) -> (B,) int64. The cuts apply one after the other, top_k first.

    noise (B, V), float32: draws from the exponential distribution of rate 1; a temperature of 0 leaves them aside.
    """
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
    return (logits - noise.log()).argmax(-1)


def decode(
    network: Network, tokens: Tensor, state: State, sampling: Sampling, noises: Sequence[Tensor]
) -> tuple[Tokens, State]:
    """Takes a step and a token for each of the noises: the last tokens (B,) -> the next ones (B, len(noises))."""
    chosen = []
    for noise in noises:
        logits, state = network.step(tokens, state)
        tokens = choose(logits, sampling, noise)
        chosen.append(tokens)
    return torch.stack(chosen, 1), state


@torch.no_grad()
def generate(
    network: Network, prompts: Tokens, window: int, sampling: Sampling, decode_at_once: Decode = decode
) -> Tokens:
    """Continues prompts (B, T), T >= 1, by `sampling.max_new_tokens` tokens: (B, max_new_tokens).

    A network without a state recomputes its context for every token. The network's training mode is left as it was.
    `decode_at_once` stands in for `decode` where AT_ONCE tokens are wanted, for instance compiled.
    """
    was_training = network.training
    network.eval()
    try:
        generator = torch.Generator(prompts.device).manual_seed(sampling.seed)
        start, batch_size = prompts.shape[1], prompts.shape[0]
        text = prompts.new_empty(batch_size, start + sampling.max_new_tokens)
        text[:, :start] = prompts

        def noise() -> Tensor:
            drawn = torch.empty(batch_size, network.vocab_size, device=prompts.device)
            return drawn if sampling.temperature == 0 else drawn.exponential_(generator=generator)

        state: State | None = None
        begin = max(0, start - window)  # where the context starts in the text
        end = start
        while end < text.shape[1]:
            if end - begin > window:
                begin = end - max(1, window // 2)
                state = None
            if state is not None:
                at_once = AT_ONCE if end + AT_ONCE <= min(text.shape[1], begin + window + 1) else 1
                take = decode if at_once == 1 else decode_at_once
                following, state = take(network, text[:, end - 1], state, sampling, [noise() for _ in range(at_once)])
            else:
                if network.stateful:
                    room = network.init_state(batch_size, window)
                    logits, state = network.prefill(text[:, begin:end], room)
                else:
                    logits = network(text[:, begin:end])
                following = choose(logits[:, -1], sampling, noise())[:, None]
            text[:, end : end + following.shape[1]] = following
            end += following.shape[1]
        return text[:, start:]
    finally:
        network.train(was_training)
