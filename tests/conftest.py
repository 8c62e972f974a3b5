"""One thread and repeatable draws: a test fails because of a change, never by chance."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import rich
import torch

from tests.laboratory import Laboratory, working_in

torch.set_num_threads(1)
hypothesis.settings.register_profile("llmx", max_examples=15, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("llmx")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seeds torch before any fixture of the test, so that the draws of other tests do not matter."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def console(monkeypatch):
    """Gives every test a new console: rich keeps the width that it finds at first use."""
    monkeypatch.setattr(rich, "_console", None)


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    """A working directory with a corpus and a tiny config."""
    with working_in(tmp_path, monkeypatch):
        yield Laboratory(tmp_path)
