"""One thread and repeatable draws: a red test is due to a change, never to luck."""

import hypothesis
import pytest
import rich
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("llmx", max_examples=15, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("llmx")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture of the test: what another test has drawn, here or in another process, is of no matter."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def console(monkeypatch):
    """rich's own console keeps the width that it finds when it is first used: every test has a new one."""
    monkeypatch.setattr(rich, "_console", None)
