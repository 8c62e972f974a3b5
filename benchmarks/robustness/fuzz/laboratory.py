"""Where cases run: a folder with a corpus, a config and a finished run, and the judgement of each outcome."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from benchmarks.robustness.fuzz.case import Case, config
from benchmarks.robustness.fuzz.kinds import kinds
from llmx.cli import main as command_line
from testbed.tiny import TEXT

SECONDS = 30  # limit for one case; a tiny run takes one or two
MEMORY = 8 * 2**30  # limit in bytes of address space beyond those at the start


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ran, refused, or a failure (traceback, nameless, left behind, silent, too slow)."""

    case: Case
    what: str
    message: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.what not in ("ran", "refused")

    def report(self) -> str:
        """The whole failure: command, names, message and files."""
        files = {name: None if content is None else repr(content)[:3000] for name, content in self.case.files.items()}
        case = f"{self.what}, {self.case.kind}, {self.case.arguments}, must name one of {self.case.names}"
        return f"{case}: {self.message[-600:]}\n{files}"


class TooSlow(BaseException):
    """A BaseException, so that no `except Exception` on the way catches it."""


class FuzzLaboratory:
    """A folder with a corpus, a config and a run. Enter it before running cases; every case runs in a copy."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.template = folder / "template"

    def __enter__(self) -> FuzzLaboratory:
        self._before = os.getcwd(), list(sys.path), dict(os.environ)
        os.environ["LLMX_CACHE"] = os.environ["LLMX_DATA_PATH"] = str(self.folder / "data")
        os.environ["CXX"] = "no-such-compiler"  # compiling takes half a minute and is not tested here
        for name in ("tinyshakespeare", "text8", "enwik8"):  # found here and refused, so nothing is downloaded
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
        """Runs a case in a fresh copy of the template."""
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
            return _run(case)
        finally:
            os.chdir(self.folder)
            sys.path[:] = self._before[1]
            torch.use_deterministic_algorithms(False)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            shutil.rmtree(place)


def _run(case: Case) -> Outcome:
    before, start = _tree(), time.perf_counter()
    errors = io.StringIO()
    code: Any = None
    trace = ""
    former = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), warnings.catch_warnings():
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
    text = errors.getvalue()
    if code in ("too slow", "traceback"):
        return Outcome(case, str(code), trace, seconds)
    messages = [line for line in text.splitlines() if line.startswith("error: ")]
    if code in (0, 1, None):
        return Outcome(case, "nameless" if messages else "ran", text[-500:], seconds)
    message = text[text.rindex("error: ") :] if messages else ""
    if "Traceback" in text:
        what = "traceback"
    elif len(messages) != 1:
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
    """All files and folders here, but for Python's caches and the sweep database, which keeps failed trials."""
    found = {}
    for path in Path().rglob("*"):
        if "__pycache__" not in path.parts and path.name != "sweeps.db":
            status = path.lstat()
            found[str(path)] = (
                (0, 0) if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns)
            )
    return found


def outcomes(lab: FuzzLaboratory, cases: int, seed: int = 0, only: Sequence[str] = ()) -> Iterator[Outcome]:
    """Runs so many cases, one after the other. The same seed gives the same cases."""
    chosen = {name: kind for name, kind in kinds(lab.template).items() if not only or name in only}
    whole = sum(share for share, _ in chosen.values())
    for number, (share, strategy) in enumerate(chosen.values()):
        yield from _drawn(lab, strategy(), max(1, round(cases * share / whole)), seed * 100 + number)


def _drawn(lab: FuzzLaboratory, strategy: st.SearchStrategy[Case], cases: int, seed: int) -> list[Outcome]:
    """Keeps all outcomes: a Hypothesis test would stop at the first failure to shrink it."""
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
            print(found[-1].report(), file=sys.__stderr__, flush=True)

    run()
    return found
