"""Generation by prefill and step.

At the end of the window: no network gets more positions than it was trained on. When the context has grown to the
window, one prefill reads its last half again and decoding continues from there. So each new character sees between half
a window and a whole window of text. Of a longer prompt only the end counts.

With `speculate` the head proposes tokens beyond the next one, and one prefill reads them all (blockwise parallel
decoding, arXiv 1811.03115, on the drafts of arXiv 2404.19737). A draft stands if sampling chooses the same token at its
place, with the noise of that place. So the text is that of ordinary sampling, up to the rounding of a prefill against
steps, however good the drafts are. Drafts use the noise of their places too: where head and network agree on the
distribution, they agree on the draw. All rows advance by the drafts that stand in every row. The prefill runs on a copy
of the state, as a mixer may write in place or forget. If a draft falls, the earlier state stays, and the next prefill
reads the tokens that stand again together with the next drafts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from llmx.protocol import Network, State, Tokens

TOKENS_A_CALL = 4  # of a compiled `decode`: more gains little and compiles slowly


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token. A value out of range raises ValueError.

    Args:
        max_new_tokens: tokens to generate for each prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens.
        top_p: only the smallest set of tokens with this probability (arXiv 1904.09751).
        min_p: only tokens with at least this share of the highest probability (arXiv 2407.01082).
        seed: seed of the draws. The same seed and prompts give the same text.
        speculate: drafts that one prefill reads, at most as many as the network's head makes. 0 goes token by token.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    speculate: int = 0

    def __post_init__(self) -> None:
        for name, valid, problem in (
            ("max_new_tokens", self.max_new_tokens >= 0, "is below 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "is not a finite number from 0 on"),
            ("top_k", self.top_k is None or self.top_k >= 1, "is below 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "is not in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "is not in [0, 1]"),
            ("seed", -(2**63) <= self.seed < 2**64, "does not fit into 64 bits"),
            ("speculate", self.speculate >= 0, "is below 0"),
        ):
            if not valid:
                raise ValueError(f"{name}: {getattr(self, name)} {problem}")


Decode = Callable[[Network, Tensor, State, Sampling, Sequence[Tensor]], tuple[Tokens, State]]


def choose(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Chooses one token a row: logits (..., V) -> (...) int64. The cuts apply one after the other, top_k first.

    noise (..., V), float32: draws from the exponential distribution of rate 1. A temperature of 0 ignores them.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # subtract the highest: a tiny temperature then gives -inf and never inf
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k is not None:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # likelier tokens already hold top_p
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
    """Makes a step and chooses a token for each noise: the last tokens (B,) -> the next ones (B, len(noises))."""
    chosen = []
    for noise in noises:
        logits, state = network.step(tokens, state)
        tokens = choose(logits, sampling, noise)
        chosen.append(tokens)
    return torch.stack(chosen, 1), state


def check_drafts(network: Network, sampling: Sampling) -> None:
    """Raises ValueError if the network makes too few drafts, or has no state."""
    if not sampling.speculate:
        return
    if not network.drafts:
        raise ValueError(
            "speculate: this network makes no drafts; one with a MultiTokenHead does, such as configs/multi_token.yaml"
        )
    if sampling.speculate > network.drafts:
        raise ValueError(f"speculate: {sampling.speculate} is more than the {network.drafts} drafts of the head")
    if not network.stateful:
        raise ValueError("speculate: this network has a mixer without a state, so it cannot read drafts")


class Noise:
    """The noise (B, V) of every place of a text (B, L) from `start` on, drawn once and in order."""

    def __init__(self, text: Tokens, start: int, vocab_size: int, sampling: Sampling):
        self.generator = torch.Generator(text.device).manual_seed(sampling.seed)
        self.greedy = sampling.temperature == 0
        self.shape = (text.shape[0], vocab_size)
        self.first = start  # place of the first in `held`
        self.held: deque[Tensor] = deque()

    def at(self, begin: int, end: int) -> list[Tensor]:
        """The noise of the places from begin to end. Drops earlier places, which no later call may ask for."""
        while self.first + len(self.held) < end:
            drawn = torch.empty(self.shape, device=self.generator.device)
            self.held.append(drawn if self.greedy else drawn.exponential_(generator=self.generator))
        while self.first < begin:
            self.held.popleft()
            self.first += 1
        return list(self.held)[: end - begin]


@torch.no_grad()
def generate(
    network: Network, prompts: Tokens, window: int, sampling: Sampling, decode_at_once: Decode = decode
) -> Tokens:
    """Continues prompts (B, T), T >= 1, by `sampling.max_new_tokens` tokens: (B, max_new_tokens).

    A network without a state recomputes its context for every token. The network keeps its training mode.
    `decode_at_once`, for instance compiled, replaces `decode` in calls for TOKENS_A_CALL tokens. Raises ValueError if
    the network cannot `speculate`.
    """
    check_drafts(network, sampling)
    was_training = network.training
    network.eval()
    try:
        start = prompts.shape[1]
        text = prompts.new_empty(prompts.shape[0], start + sampling.max_new_tokens)
        text[:, :start] = prompts
        noise = Noise(text, start, network.vocab_size, sampling)
        if sampling.speculate:
            _speculate(network, text, start, window, sampling, noise)
        else:
            _token_by_token(network, text, start, window, sampling, noise, decode_at_once)
        return text[:, start:]
    finally:
        network.train(was_training)


def _token_by_token(
    network: Network, text: Tokens, end: int, window: int, sampling: Sampling, noise: Noise, decode_at_once: Decode
) -> None:
    """Fills the text from `end` on, token by token."""
    state: State | None = None
    begin = max(0, end - window)  # start of the context in the text
    while end < text.shape[1]:
        if end - begin > window:
            begin = end - max(1, window // 2)
            state = None
        if state is None and network.stateful and end - begin == 1:
            state = network.init_state(text.shape[0], window)  # a single token needs no prefill
        if state is not None:
            at_once = TOKENS_A_CALL if end + TOKENS_A_CALL <= min(text.shape[1], begin + window + 1) else 1
            take = decode if at_once == 1 else decode_at_once
            following, state = take(network, text[:, end - 1], state, sampling, noise.at(end, end + at_once))
        else:
            if network.stateful:
                logits, state = network.prefill(text[:, begin:end], network.init_state(text.shape[0], window))
            else:
                logits = network(text[:, begin:end])
            following = choose(logits[:, -1], sampling, noise.at(end, end + 1)[0])[:, None]
        text[:, end : end + following.shape[1]] = following
        end += following.shape[1]


def _speculate(network: Network, text: Tokens, end: int, window: int, sampling: Sampling, noise: Noise) -> None:
    """Fills the text from `end` on, with several tokens a prefill where drafts stand."""
    drafts = text[:, :0]  # (B, n), for the places from `end` on
    state = network.init_state(text.shape[0], window)  # after the tokens from `begin` to `read`
    begin = read = max(0, end - window)
    most = sampling.speculate
    while end < text.shape[1]:
        if end - begin > window:
            begin = read = end - max(1, window // 2)
            drafts = text[:, :0]
            state = network.init_state(text.shape[0], window)
        drafts = drafts[:, : min(begin + window, text.shape[1] - 1) - end]
        n = drafts.shape[1]
        if n and end - read > most + 1:  # too many tokens to read repeatedly
            state = network.prefill_ahead(text[:, read : end - 1], state, 1)[1]
            read = end - 1
        seen = torch.cat((text[:, read:end], drafts), 1)
        before = tree_map(torch.clone, state) if n else state
        logits, after = network.prefill_ahead(seen, before, n + 1)  # (B, n + 1, 1 + drafts, V)
        noises = torch.stack(noise.at(end, end + n + 1 + most), 1)  # (B, n + 1 + most, V)
        chosen = choose(logits[:, :, 0], sampling, noises[:, : n + 1])
        stand = int((chosen[:, :n] == drafts).all(0).cumprod(0).sum())
        text[:, end : end + stand + 1] = chosen[:, : stand + 1]
        if stand == n:
            state, read = after, end + n
        drafts = choose(logits[:, stand, 1 : 1 + most], sampling, noises[:, stand + 1 : stand + 1 + most])
        end += stand + 1
