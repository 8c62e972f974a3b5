"""Generation with a cache: ours against transformers' `generate`, and the time to the first token of a long prompt.

All run in float32 and draw from the plain softmax. Ours runs compiled, as a long generation does, and eager, as a short
one does; transformers runs with its defaults. On a CUDA device ours also replays both from a CUDA graph.

    python -m benchmarks.generate --out docs/results/generate.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.device import DEVICE, now
from benchmarks.harness import Case, Contender, Measure, finish, measure_in_turns, parser, use_threads
from benchmarks.peers import SETTINGS, hf_gpt2, hf_llama, ours
from llmx.generation import Decode, Sampling, decode, generate
from llmx.protocol import Network, State, Tokens
from llmx.training.hardware import compiled_decode

WINDOWS = (32, 256)
Generate = Callable[["Text"], Tensor]  # -> prompts and continuations, or continuations alone


@dataclass(frozen=True)
class Text(Case):
    """Prompts of `prompt` characters, continued by `new` characters within the window."""

    batch_size: int = 1
    window: int = 32
    prompt: int = 1
    new: int = 28
    temperature: float = 0.0  # 0: greedy


def cases() -> list[Text]:
    decoding = [
        Text(
            f"batch {batch_size}, {window - 4} tokens, {'sampling' if temperature else 'greedy'}",
            batch_size=batch_size,
            window=window,
            new=window - 4,  # four at once
            temperature=temperature,
        )
        for window in WINDOWS
        for batch_size in (1, 64)
        for temperature in (0.0, 1.0)
    ]
    return [*decoding, Text("first token, prompt 256", unit="s", window=256, prompt=256, new=1)]


class Replayed:
    """`decode` as one launch: a CUDA graph for every shape, whose own state each replay advances.

    A call returns the graph's own state. So only the state of a new text, or parts that a step has replaced, are
    copied. It serves one text at a time.
    """

    def __init__(self, decode_at_once: Decode):
        self.decode = decode_at_once
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any, Any]] = {}

    def __call__(
        self, network: Network, tokens: Tensor, state: State, sampling: Sampling, noises: Sequence[Tensor]
    ) -> tuple[Tokens, State]:
        given = (tokens, state, list(noises))
        key = (sampling.temperature, *(leaf.shape for leaf in tree_leaves(given)))
        if key not in self.graphs:
            self.graphs[key] = self._capture(network, given, sampling)
        graph, inputs, following = self.graphs[key]
        _copy(inputs, given)
        graph.replay()
        return following.clone(), inputs[1]

    def _capture(self, network: Network, given: Any, sampling: Sampling) -> tuple[torch.cuda.CUDAGraph, Any, Any]:
        inputs = tree_map(torch.clone, given)
        tokens, state, noises = inputs

        def advance() -> Tensor:
            following, after = self.decode(network, tokens, state, sampling, noises)
            _copy(state, after)
            return following

        for _ in range(3):  # compiles, and initialises libraries
            _copy(inputs, given)  # from the same position each time
            advance()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            following = advance()
        return graph, inputs, following


def _copy(into: Any, what: Any) -> None:
    for target, source in zip(tree_leaves(into), tree_leaves(what), strict=True):
        if target is not source:
            target.copy_(source)


def prepare_ours(least: float, compiled: bool, replayed: bool = False) -> Measure:
    network = ours(SETTINGS["founding"]).to(DEVICE)
    decode_at_once: Decode = compiled_decode() if compiled else decode
    if replayed:
        decode_at_once = Replayed(decode_at_once)

    def continued(text: Text) -> Tensor:
        prompts = torch.zeros(text.batch_size, text.prompt, dtype=torch.int64, device=DEVICE)
        return generate(network, prompts, text.window, Sampling(text.new, text.temperature), decode_at_once)

    return partial(_measure, continued, least)


def prepare_transformers(build: Callable[..., Any], least: float) -> Measure:
    networks = {window: build(replace(SETTINGS["founding"], window=window)).to(DEVICE).eval() for window in WINDOWS}

    def continued(text: Text) -> Tensor:
        prompts = torch.zeros(text.batch_size, text.prompt, dtype=torch.int64, device=DEVICE)
        draws = {"do_sample": True, "temperature": text.temperature, "top_k": 0} if text.temperature else {}
        options = {"do_sample": False, "use_cache": True, "max_new_tokens": text.new, **draws}
        tokens = networks[text.window].generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return tokens[:, text.prompt :]

    return partial(_measure, continued, least)


def _measure(continued: Generate, least: float, text: Text) -> float:
    """Tokens per second over all rows, or seconds a call. Repeats the call for at least `least` seconds.

    Raises:
        RuntimeError: if a continuation stops early.
    """
    calls, start, seconds = 0, now(), 0.0
    while seconds < least:
        tokens = continued(text)
        calls, seconds = calls + 1, now() - start
    seconds /= calls
    if tokens.shape != (text.batch_size, text.new):
        raise RuntimeError(f"generated {tuple(tokens.shape)} tokens instead of {(text.batch_size, text.new)}")
    return seconds if text.unit == "s" else tokens.numel() / seconds


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=1.0, help="seconds for each contender and case in each round")
    chosen = options.parse_args()
    use_threads(chosen.threads)
    least = chosen.seconds
    flags = {"precision": "32-true", "compile": False, "cache": True}
    written_out = {**flags, "attention": "written out, sdpa for a prompt"}
    contenders = [
        Contender("llmx, compiled", partial(prepare_ours, least, True), {**written_out, "compile": True}),
        Contender("llmx, eager", partial(prepare_ours, least, False), written_out),
        Contender("transformers Llama", partial(prepare_transformers, hf_llama, least), {**flags, "attention": "sdpa"}),
        Contender("transformers GPT-2", partial(prepare_transformers, hf_gpt2, least), {**flags, "attention": "sdpa"}),
    ]
    if DEVICE.type == "cuda":
        contenders[2:2] = [
            Contender("llmx, compiled, CUDA graph", partial(prepare_ours, least, True, True), contenders[0].flags),
            Contender("llmx, eager, CUDA graph", partial(prepare_ours, least, False, True), written_out),
        ]
    return finish("generation", measure_in_turns(contenders, cases(), chosen.repeats), chosen)


if __name__ == "__main__":
    sys.exit(main())
