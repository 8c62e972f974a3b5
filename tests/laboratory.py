"""A working directory with a corpus and a tiny config, where tests run the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmx.cli import main
from testbed.tiny import TEXT, network


class Laboratory:
    """A folder with corpus.txt and tiny.yaml. A fit of tiny.yaml takes a second.

    folder: the working directory
    config: the content of tiny.yaml; `configure` changes it
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = {
            "seed_everything": 3,
            "trainer": {
                "max_steps": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "precision": "32-true",  # losses compare to 1e-5
            },
            "data": {"corpus": "corpus.txt", "window": 8, "batch_size": 4},
            "model": {"network": network(depth=1)},
        }
        self.write_corpus()
        self.configure()

    def write_corpus(self, text: str = TEXT, name: str = "corpus.txt") -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_config(self, config: dict[str, Any], name: str) -> None:
        (self.folder / name).write_text(yaml.safe_dump(config, sort_keys=False))

    def configure(self, **sections: dict[str, Any]) -> dict[str, Any]:
        """Puts settings over those of a section (`trainer`, `data`, `model`) of tiny.yaml and returns its content."""
        for name, settings in sections.items():
            self.config[name] |= settings
        self.write_config(self.config, "tiny.yaml")
        return self.config

    def run(self, *arguments: Any, code: int = 0) -> None:
        """Runs a command line, which has to end with an exit code."""
        assert main([str(argument) for argument in arguments]) == code

    def fit(self, *arguments: Any) -> Path:
        """Fits tiny.yaml and returns the folder of the run."""
        self.run("fit", "--config", "tiny.yaml", *arguments)
        return newest_run()

    def refusal(self, capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
        """Runs a command line that has to be refused and to leave no run; returns its one message."""
        before = set(Path().glob("lightning_logs/*"))
        self.run(*arguments, code=2)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert error.count("error: ") == 1
        assert set(Path().glob("lightning_logs/*")) == before
        return error[error.index("error: ") :]


@contextmanager
def working_in(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes a folder the working directory, with a cache of its own.

    Forgets the modules that were imported from it at the end: another test may have other modules of the same names.
    """
    patch.chdir(folder)
    patch.setenv("LLMX_CACHE", str(folder / "cache"))
    patch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (folder / f"{name}.py").exists():
            del sys.modules[name]


def newest_run() -> Path:
    """The last run below the working directory."""
    return max(Path("lightning_logs").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar, by tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
