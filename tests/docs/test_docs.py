"""The pages for those who add something, followed to the letter in a folder that holds the checkout's main.py and
configs, with no other file than those that the page writes."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from llmx.cli import main
from tests.laboratory import working_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    with working_in(tmp_path, monkeypatch):
        yield tmp_path


def follow(page: str, capsys) -> tuple[list[str], list[tuple[str, int, str]]]:
    """Does what a page says, block by block: writes its files, runs its commands.

    Returns the files, and of each command the words, the exit code and what it printed.
    """
    files: list[str] = []
    results = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        if language in ("python", "yaml"):
            name, _, place = block.split("\n", 1)[0].removeprefix("# ").partition(", ")
            assert place in ("", "at its end"), place
            with open(name, "a" if place else "x") as file:
                file.write(block)
            files.append(name)
        for line in block.splitlines() if language == "bash" else []:
            words = shlex.split(line)
            assert words[:2] == ["python", "main.py"]
            for module in {Path(name).stem for name in files if name.endswith(".py")} & set(sys.modules):
                del sys.modules[module]  # a new process would read it again
            code = main(words[2:])
            results.append((line, code, " ".join(capsys.readouterr().out.split())))
    return files, results


@pytest.fixture
def capture(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return capsys


def test_the_tutorial_needs_one_python_file_and_one_config_and_its_mistake_is_caught(checkout, capture):
    files, results = follow("add_your_own.md", capture)
    assert set(files) == {"leaky.py", "configs/leaky.yaml"}
    assert sorted(p.name for p in checkout.iterdir()) == ["cache", "configs", "leaky.py", "lightning_logs", "main.py"]
    *sound, (_, code, caught) = results
    for line, exit_code, output in sound:
        assert exit_code == 0, (line, output)
    described, audited, fitted, predicted = (output for _, _, output in sound)
    assert "Leaky" in described
    assert "no leak" in audited
    assert "one function" in audited
    assert "a gradient reaches every one" in audited
    assert "val loss" in fitted
    assert "ROMEO:" in predicted
    assert code == 1
    page = (ROOT / "docs" / "add_your_own.md").read_text()
    shown = " ".join(re.search(r"```text\n(.*?)```", page, re.DOTALL).group(1).split())
    for part in shown.split(" ... "):  # word for word, but for the numbers
        assert re.search(_pattern(part), caught), (part, caught)


def _pattern(shown: str) -> str:
    """What is shown, with any numbers in the place of its own."""
    return r"[\d.e-]*\d".join(re.escape(piece) for piece in re.split(r"[\d.]*\d", shown))


def test_norm_residual_scheme_and_feed_forward_of_ones_own_pass_the_audits(checkout, capture):
    files, results = follow("add_your_own_parts.md", capture)
    assert files == ["own_parts.py", "configs/own_parts.yaml"]
    for line, code, output in results:
        assert code == 0, (line, output)
    assert "no leak" in results[0][2]
    assert "one function" in results[0][2]
    assert "val loss" in results[1][2]
