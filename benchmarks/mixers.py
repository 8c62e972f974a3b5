"""The collection side by side: training at three lengths, memory, decoding early and late, bytes of the state.

Every contender is the network of a config (dim 128, depth 4, about 0.80 M parameters) without its window, and with a
`max_length` for all lengths. Training uses the loop of benchmarks.train with the same number of tokens a step, so time
rises with the length only where cost is not linear in it. Peers are transformers' PyTorch paths and, on a CUDA device,
the kernels of flash-linear-attention, at the same dimensions.

    python -m benchmarks.mixers                          # all configs that have a parallel form
    python -m benchmarks.mixers llama mamba gru --out docs/results/speed/mixers.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.collection import CONFIGS, collection
from benchmarks.device import DEVICE, now
from benchmarks.harness import Case, Contender, Measure, Result, finish, measure_in_turns, parser, use_threads
from benchmarks.peers import RECURRENT, Shape
from benchmarks.train import Mode, prepare_loop
from llmx.config.base_files import read_config
from llmx.config.factories import components_by_name, from_config
from llmx.parts.parameter_count import count_bytes
from llmx.protocol import Network
from llmx.training.hardware import fast_precision, keep_freed_memory

LENGTHS = (256, 1024, 4096)
EARLY, LATE, FAR = 100, 20_000, 100_000  # tokens before the timed ones; at FAR only the state is counted
CHUNK = 500  # tokens of each prefill before the timed tokens
DECODED = 32  # timed tokens
VOCABULARY = 65
BASELINE = "llama"
AT_ONCE = 4  # contenders beside the baseline: each keeps a process and the memory of its longest text


def network_of(name: str) -> Callable[[Shape], Network]:
    """A function that builds the network of a config; it takes only the vocabulary size from the shape."""
    config = _in_full(read_config(CONFIGS / f"{name}.yaml")["model"]["network"], components_by_name())
    factory = from_config(config)
    return lambda shape: factory(shape.vocab_size)


def _in_full(value: Any, known: dict[str, type]) -> Any:
    """The config with whole class paths, also for a name alone, and a max_length for the longest text."""
    if isinstance(value, dict):
        special = {"class_path": lambda item: _path(item, known), "max_length": lambda _: FAR}
        return {key: special[key](item) if key in special else _in_full(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_full(item, known) for item in value]
    return {"class_path": _path(value, known)} if value in known else value


def _path(name: str, known: dict[str, type]) -> str:
    return f"{known[name].__module__}.{name}" if name in known else name


def prepare(name: str, steps: int, tokens: int) -> Measure:
    """Prepares a function that answers the cases `train N`, `decode N` and `state N`."""
    keep_freed_memory()  # as `fit` does; peers run as their users run them
    build = network_of(name)

    def measure(case: Case) -> float:
        what, length = case.name.split()
        if what == "train":
            return prepare_training(build, steps, tokens)(case)
        network = build(Shape(4, 128, 4, 341, window=0, batch_size=1)).to(DEVICE).eval()
        return state_bytes(network, int(length)) if what == "state" else seconds_a_token(network, int(length))

    return measure


def prepare_training(build: Callable[[Shape], Any], steps: int, tokens: int) -> Measure:
    mode = Mode(fast_precision("auto"), compile=False)

    def measure(case: Case) -> float:
        window = int(case.name.split()[1])
        shape = Shape(4, 128, 4, 341, window, tokens // window)
        return prepare_loop(build, shape, mode, steps)(case)

    return measure


def state_bytes(network: Network, length: int) -> float:
    return count_bytes(network.to("meta").init_state(1, length))


@torch.inference_mode()
def seconds_a_token(network: Network, length: int) -> float:
    """The median of DECODED steps after `length` tokens, for one row, eager."""
    state = network.init_state(1, length + DECODED)
    for chunk in torch.zeros(1, length, dtype=torch.int64, device=DEVICE).split(CHUNK, 1):
        _, state = network.prefill(chunk, state)
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    seconds = []
    for _ in range(DECODED):
        start = now()
        _, state = network.step(token, state)
        seconds.append(now() - start)
    return median(seconds)


def summary(groups: Sequence[Sequence[Result]]) -> Table:
    """One row a contender. The baseline's row is from the first group; ratios use the baseline of the same group."""
    rows = Table(title="the collection side by side", caption="medians; decoding is eager, one row")
    headings = ["tokens/s at 256", "of attention's", "at 1,024", "at 4,096", "time 4,096 / 1,024", "memory"]
    headings += [f"ms a token after {EARLY}", f"{LATE:,}", f"state bytes at {EARLY}", f"{FAR:,}"]
    rows.add_column("network")
    for heading in headings:
        rows.add_column(heading, justify="right")
    shown: set[str] = set()
    for group in groups:
        for name in dict.fromkeys(result.contender for result in group):
            if name not in shown:
                rows.add_row(name, *_cells(name, group))
            shown.add(name)
    return rows


def _cells(name: str, group: Sequence[Result]) -> list[str]:
    values = {(r.contender, r.case.name): median(r.values) for r in group if r.values}
    peaks = {(r.contender, r.case.name): r.peak_bytes for r in group}

    def cell(case: str, form: str, factor: float = 1) -> str:
        value = values.get((name, case))
        return "" if value is None else format(factor * value, form)

    def ratio(over: float | None, under: float | None) -> str:
        return f"{over / under:.2f}" if over and under else ""

    rates = {length: values.get((name, f"train {length}")) for length in LENGTHS}
    return [
        cell("train 256", ",.0f"),
        ratio(rates[256], values.get((BASELINE, "train 256"))),
        cell("train 1024", ",.0f"),
        cell("train 4096", ",.0f"),
        ratio(rates[1024], rates[4096]),
        ratio(peaks.get((name, "train 4096")), peaks.get((name, "train 1024"))),
        cell(f"decode {EARLY}", ".2f", 1000),
        cell(f"decode {LATE}", ".2f", 1000),
        cell(f"state {EARLY}", ",.0f"),
        cell(f"state {FAR}", ",.0f"),
    ]


def measured(names: Sequence[str], options: argparse.Namespace) -> list[Result]:
    """Measures training, decoding and state of a few contenders side by side."""
    peers = [
        Contender(RECURRENT[name].name, partial(prepare_training, RECURRENT[name].build, options.steps, options.tokens))
        for name in names
        if name in RECURRENT
    ]
    ours = [
        Contender(name, partial(prepare, name, options.steps, options.tokens))
        for name in names
        if name not in RECURRENT
    ]
    lengths = [Case(f"train {length}") for length in LENGTHS] if options.train else []
    training = measure_in_turns([*ours, *peers], lengths, options.repeats)
    stateful = [contender for contender in ours if network_of(contender.name)(Shape(4, 128, 4, 341, 0, 1)).stateful]
    late = [Case(f"decode {length}", "s") for length in (EARLY, LATE)] if options.decode else []
    states = [Case(f"state {length}", "bytes") for length in (EARLY, FAR)]
    return training + measure_in_turns(stateful, [*late, *states], 1 if options.train else options.repeats)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", help="configs and peers (default: all)")
    options.add_argument("--steps", type=int, default=2, help="training steps a round")
    options.add_argument("--tokens", type=int, default=4096, help=f"a training step; a multiple of {LENGTHS[-1]}")
    options.add_argument("--train", action=argparse.BooleanOptionalAction, default=True, help="measure training")
    options.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True, help="measure decoding too")
    chosen = options.parse_args()
    configs = [name for name in collection() if name != "ngram"]
    if chosen.tokens < LENGTHS[-1] or chosen.tokens % LENGTHS[-1]:
        options.error(f"--tokens: {chosen.tokens} is not a multiple of {LENGTHS[-1]}")
    if unknown := [name for name in chosen.names if name not in configs and name not in RECURRENT]:
        options.error(f"names: there is no {unknown[0]!r}; choose from {', '.join([*configs, *RECURRENT])}")
    beside = [BASELINE] if chosen.train else []  # the baseline of ratios
    names = [name for name in chosen.names or [*configs, *RECURRENT] if name not in beside]
    use_threads(chosen.threads)
    turns = [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)] or [[]]
    groups: list[list[Result]] = []
    code = 0
    for few in turns:
        groups.append(measured([*beside, *few], chosen))
        # written after every group, in case a later one fails
        code = finish("mixers", [result for group in groups for result in group], chosen)
    Console(width=180).print(summary(groups))
    return code


if __name__ == "__main__":
    sys.exit(main())
