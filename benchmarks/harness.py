"""Measures contenders in turns, and makes the table and the JSON file.

Absolute speeds on a shared machine drift from minute to minute. So every contender prepares and waits in its own
process, with its own compile caches and memory. They measure in turns, A B A B ..., and the first round is thrown away.
Ratios are taken within a round, between numbers that are neighbours in time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# torch is imported only where it is needed. A process that only starts commands stays small without it, and so does
# the peak of memory that the system reports for its children.
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from llmx.runs.memory import peak_bytes, peak_bytes_of_children

CHECKOUT = Path(__file__).resolve().parents[1]
PEER_PACKAGES = ("transformers", "litgpt", "x-transformers", "flash-linear-attention")
WIDTH = 160  # smallest width of the table: a narrower one would cut names and numbers
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Case:
    """What is measured. In a unit per second (`tokens/s`) more is better, in `s` less is."""

    name: str
    unit: str = "tokens/s"


Measure = Callable[[Any], float]  # a Case -> the value in its unit


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    prepare: runs once, in the contender's own process, so it must be picklable
    flags:   how it runs, for the JSON file
    """

    name: str
    prepare: Callable[[], Measure]
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """One contender in one case: the value of every round in the case's unit, or the error."""

    case: Case
    contender: str
    flags: Mapping[str, Any]
    values: list[float]
    peak_bytes: int = 0  # the contender's largest process so far; on a CUDA device the last round
    error: str | None = None
    roof_fraction: list[float] | None = None  # fraction of the machine's measured matrix product rate


class Summary(NamedTuple):
    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    return Summary(median(values), min(values), max(values))


def speedups(ours: Sequence[float], theirs: Sequence[float], unit: str) -> list[float]:
    """How many times as fast ours is, round by round.

    Raises:
        ValueError: for unequal numbers of rounds.
    """
    quotients = [our / their for our, their in zip(ours, theirs, strict=True)]
    return [1 / quotient for quotient in quotients] if unit == "s" else quotients


def measure_in_turns(contenders: Sequence[Contender], cases: Sequence[Case], repeats: int) -> list[Result]:
    """Measures all contenders in all cases, in `repeats` rounds after a warm-up round.

    A contender that fails, or whose package is not installed, has an `error` and no values from then on.
    """
    workers = [_Worker(contender) for contender in contenders]
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * (repeats + 1) * len(workers))
        for case in cases:
            values: list[list[float]] = [[] for _ in workers]
            for round_number in range(repeats + 1):
                for worker, row in zip(workers, values, strict=True):
                    progress.update(task, description=f"{case.name}: {worker.contender.name}")
                    value = worker.measure(case)
                    if value is not None and round_number:
                        row.append(value)
                    progress.advance(task)
            for worker, row in zip(workers, values, strict=True):
                name, flags = worker.contender.name, worker.contender.flags
                row = [] if worker.error else row
                results.append(Result(case, name, flags, row, worker.peak_bytes, worker.error))
    for worker in workers:
        worker.close()
    return results


class _Worker:
    """A handle on a contender's process."""

    def __init__(self, contender: Contender):
        self.contender = contender
        self.peak_bytes = 0
        self.error: str | None = None
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(contender.prepare, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()  # waits until it is prepared, so that nothing else runs meanwhile

    def measure(self, case: Case) -> float | None:
        if self.error is not None:
            return None
        with suppress(BrokenPipeError):  # the process has ended; _receive says so
            self.connection.send(case)
        return self._receive()

    def close(self) -> None:
        if self.error is None:
            self.connection.send(None)
        self.process.join()

    def _receive(self) -> float | None:
        try:
            value, peak_bytes, self.error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            value, peak_bytes, self.error = None, 0, f"its process ended with exit code {self.process.exitcode}"
        self.peak_bytes = peak_bytes
        return value


def _serve(prepare: Callable[[], Measure], connection: Connection) -> None:
    """Runs in a contender's process: answers each case with (value, peak memory, error)."""
    try:
        measure = prepare()
        connection.send((None, _peak_bytes(), None))
        while (case := connection.recv()) is not None:
            _forget_peak()
            value = measure(case)
            connection.send((value, _peak_bytes(), None))
    except ModuleNotFoundError as error:
        connection.send((None, 0, f"{error.name} is not installed"))
    except Exception as error:  # a failing contender becomes a line in the table
        connection.send((None, 0, f"{type(error).__name__}: {error}"))


def _peak_bytes() -> int:
    """Peak memory of this process on its CUDA device: 0 for a contender that computes in another process.

    Without a device: peak resident memory of this process or of its largest child that has ended.
    """
    if cuda := _cuda():
        return cuda.max_memory_allocated()
    return max(peak_bytes() or 0, peak_bytes_of_children())


def _forget_peak() -> None:
    """Resets the peak on a CUDA device: the first rounds also hold memory for compiling and tuning."""
    if (cuda := _cuda()) and cuda.is_initialized():
        gc.collect()
        cuda.reset_peak_memory_stats()


def _cuda() -> Any:
    """torch.cuda if this process has imported torch and there is a device, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def run(command: Sequence[str]) -> None:
    """Runs a command in the checkout.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if result.returncode:
        output = (result.stderr or result.stdout).strip()
        raise RuntimeError(f"{' '.join(command)} ended with exit code {result.returncode}: {output[-500:]}")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every contender")
    options.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up round")
    options.add_argument("--out", type=Path, help="JSON file for all measurements")
    return options


def use_threads(threads: int) -> None:
    """Sets the threads of every process that starts from now on."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)


def finish(title: str, results: Sequence[Result], options: argparse.Namespace) -> int:
    """Prints the table, writes the JSON file and returns the exit code: 1 if ours, a first contender, failed."""
    Console(width=max(Console().width, WIDTH)).print(table(title, results))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record(title, results, vars(options)), indent=2) + "\n")
    return int(any(group[0].error is not None for group in _by_case(results)))


def table(title: str, results: Sequence[Result]) -> Table:
    """One row a result. The first contender of every case is ours, and the others are compared with it."""
    rows = Table(title=title, caption="median (min - max) of all rounds; ratios are taken round by round")
    for heading in ("case", "contender", "speed", "ours is ... times as fast", "of GEMM roof", "peak memory"):
        rows.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for group in _by_case(results):
        for result in group:
            label = group[0].case.name if result is group[0] else ""
            if result.error is not None:
                rows.add_row(label, result.contender, Text(result.error.strip().splitlines()[-1][-60:]))
                continue
            unit = result.case.unit
            ratio = _ratio(group[0], result)
            rows.add_row(
                label,
                result.contender,
                f"{_span(result.values)} {unit}",
                "" if ratio is None or result is group[0] else _span(ratio),
                "" if result.roof_fraction is None else f"{median(result.roof_fraction):.1%}",
                f"{result.peak_bytes / 2**20:,.0f} MiB" if result.peak_bytes else "",
            )
        rows.add_section()
    return rows


def record(title: str, results: Sequence[Result], options: Mapping[str, Any]) -> dict[str, Any]:
    """All measurements and their conditions, as plain data."""
    where = conditions()
    where["hardware"]["threads"] = options["threads"]
    rows = []
    for group in _by_case(results):
        for result in group:
            row = asdict(result)
            if result.error is None:
                row["summary"] = summarise(result.values)._asdict()
                row["ours_times_as_fast"] = _ratio(group[0], result)
            rows.append(row)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return {"benchmark": title, **where, "options": settings, "results": rows}


def conditions() -> dict[str, Any]:
    """The machine, our version and the versions of the peers, as plain data."""
    from llmx.runs.provenance import provenance

    where = provenance()
    where["versions"] |= {package: _version(package) for package in PEER_PACKAGES}
    return where


def _by_case(results: Sequence[Result]) -> list[list[Result]]:
    cases = list(dict.fromkeys(result.case for result in results))
    return [[result for result in results if result.case == case] for case in cases]


def _ratio(ours: Result, theirs: Result) -> list[float] | None:
    return None if ours.error is not None else speedups(ours.values, theirs.values, theirs.case.unit)


def _span(values: Sequence[float]) -> str:
    middle, low, high = (_number(value) for value in summarise(values))
    return f"{middle} ({low} - {high})"


def _number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
