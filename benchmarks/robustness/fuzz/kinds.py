"""All kinds of cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.robustness.fuzz.case import Case
from benchmarks.robustness.fuzz.command_cases import commands, matches, predictions, sweeps
from benchmarks.robustness.fuzz.config_cases import configs, flags, networks, yaml_files
from benchmarks.robustness.fuzz.file_cases import checkpoints, comparisons, corpora


def kinds(template: Path) -> dict[str, tuple[int, Callable[[], st.SearchStrategy[Case]]]]:
    """name -> (share of the cases, strategy). `template` is a folder with a finished run."""
    return {
        "config": (5, configs),
        "network": (5, networks),
        "flag": (5, flags),
        "yaml": (3, yaml_files),
        "command": (2, commands),
        "checkpoint": (3, partial(checkpoints, template)),
        "predict": (2, predictions),
        "sweep": (1, sweeps),
        "compare": (1, partial(comparisons, template)),
        "describe": (2, matches),
        "corpus": (2, corpora),
    }
