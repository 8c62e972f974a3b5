"""Bad input by the thousand: random faults in configs, flags, files and checkpoints, each through the command line.

    python -m benchmarks.robustness.fuzz --cases 2000 --out docs/results/fuzz.json

Every case either runs (exit code 0, or 1 where a verb says so) or is refused: exit code 2, one message that names the
key or file concerned, no traceback, and nothing new on the disk. What does neither is a failure, printed in full.
Networks are tiny and trainings one step, so that what is valid runs. Numbers whose only effect is work without an end
(steps, layers) stay small; all others are of any size, under a limit of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import hypothesis
import torch
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from benchmarks.robustness.fuzz_cases import Case, config, kinds
from llmx.cli import main as command_line
from llmx.runs.provenance import provenance
from testbed.tiny import TEXT

SECONDS = 30  # of one case; a tiny run takes one or two
MEMORY = 8 * 2**30  # bytes of addresses beyond those of the start


@dataclass(frozen=True)
class Outcome:
    """ran, refused, or how it failed: traceback, nameless, left behind, silent, too slow."""

    case: Case
    what: str
    said: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.what not in ("ran", "refused")

    def shown(self) -> str:
        files = {name: None if content is None else repr(content)[:3000] for name, content in self.case.files.items()}
        case = f"{self.what}, {self.case.kind}, {self.case.arguments}, to be named {self.case.names}"
        return f"{case}: {self.said[-600:]}\n{files}"


class TooSlow(BaseException):
    """No Exception: nothing on the way may take it for its own."""


# ------------------------------------------------------------------------------------------------------ where it runs
class Lab:
    """A folder with a corpus, a config and a run, of which every case gets a copy. Enter it before running cases."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.template = folder / "template"

    def __enter__(self) -> Lab:
        self._before = os.getcwd(), list(sys.path), dict(os.environ)
        os.environ["LLMX_CACHE"] = os.environ["LLMX_DATA_PATH"] = str(self.folder / "data")
        os.environ["CXX"] = "no-such-compiler"  # compiling takes half a minute and is not what is tried here
        for name in ("tinyshakespeare", "text8", "enwik8"):  # found here, and refused: nothing is downloaded
            (self.folder / "data" / name).mkdir(parents=True)
            (self.folder / "data" / name / "input.txt").write_text(TEXT)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, self._limits[1]))
        self.template.mkdir()
        os.chdir(self.template)
        Path("corpus.txt").write_text(TEXT)
        Path("tiny.yaml").write_text(yaml.safe_dump(config(), sort_keys=False))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if command_line(["fit", "--config", "tiny.yaml"]):
                raise RuntimeError("the valid config does not run")
        return self

    def __exit__(self, *_: Any) -> None:
        folder, sys.path[:], environment = self._before
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_AS, self._limits)

    def run(self, case: Case) -> Outcome:
        """The case in a fresh copy of the template."""
        place = self.folder / "case"
        shutil.copytree(self.template, place, symlinks=True)
        try:
            os.chdir(place)
            for name, content in case.files.items():
                path = Path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_symlink() or path.is_file():
                    path.unlink()
                path.mkdir() if content is None else path.write_bytes(content)
            return _judged(case)
        finally:
            os.chdir(self.folder)
            sys.path[:] = self._before[1]
            torch.use_deterministic_algorithms(False)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            shutil.rmtree(place)


def _judged(case: Case) -> Outcome:
    before, start = _tree(), time.perf_counter()
    out, said = io.StringIO(), io.StringIO()
    code: Any = None
    trace = ""
    former = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), warnings.catch_warnings():
            code = command_line(case.arguments)
    except SystemExit as error:
        code = error.code
    except TooSlow:
        code = "too slow"
    except BaseException:
        code = "traceback"
        trace = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    seconds = time.perf_counter() - start
    text = said.getvalue()
    if code in ("too slow", "traceback"):
        return Outcome(case, str(code), trace, seconds)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code in (0, 1, None):
        return Outcome(case, "nameless" if errors else "ran", text[-500:], seconds)
    message = text[text.rindex("error: ") :] if errors else ""
    if "Traceback" in text:
        what = "traceback"
    elif len(errors) != 1:
        what = "silent"
    elif not any(" ".join(name.split()) in message for name in case.names):
        what = "nameless"
    elif _tree() != before:
        what = "left behind"
    else:
        what = "refused"
    return Outcome(case, what, message or text[-500:], seconds)


def _too_slow(*_: Any) -> None:
    raise TooSlow


def _tree() -> dict[str, tuple[int, int]]:
    """All that lies below the working directory, but for what Python caches, and the record of failed trials."""
    found = {}
    for path in Path().rglob("*"):
        if "__pycache__" not in path.parts and path.name != "sweeps.db":
            status = path.lstat()
            found[str(path)] = (
                (0, 0) if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns)
            )
    return found


def outcomes(lab: Lab, cases: int, seed: int = 0, only: Sequence[str] = ()) -> Iterator[Outcome]:
    """Runs that many cases, one after the other; the same seed gives the same ones."""
    chosen = {name: kind for name, kind in kinds(lab.template).items() if not only or name in only}
    whole = sum(share for share, _ in chosen.values())
    for number, (share, strategy) in enumerate(chosen.values()):
        yield from _drawn(lab, strategy(), max(1, round(cases * share / whole)), seed * 100 + number)


def _drawn(lab: Lab, strategy: st.SearchStrategy[Case], cases: int, seed: int) -> list[Outcome]:
    """All are kept: a test of Hypothesis would stop at the first failure, to make it smaller."""
    found: list[Outcome] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def run(case: Case) -> None:
        found.append(lab.run(case))
        if found[-1].failed:
            print(found[-1].shown(), file=sys.__stderr__, flush=True)

    run()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the same seed gives the same cases")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of cases, all if not given")
    parser.add_argument("--out", type=Path, help="JSON file for the counts and the failures")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        done = list(outcomes(lab, options.cases, options.seed, options.only))
    counts = {name: Counter(o.what for o in done if o.case.kind == name) for name in kinds(lab.template)}
    print(json.dumps(counts, indent=1))
    failures = [outcome.shown() for outcome in done if outcome.failed]
    if options.out is not None:
        record = {
            "date": date.today().isoformat(),
            "cases": len(done),
            "seconds": round(time.perf_counter() - start),
            "outcomes": Counter(outcome.what for outcome in done),
            "by kind": {name: count for name, count in counts.items() if count},
            "failures": failures,
            **provenance(),
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
