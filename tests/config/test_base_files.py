"""Config files that build on another."""

import json
from pathlib import Path

import pytest
import yaml

from llmx.cli import main
from llmx.config.base_files import merged, read_config
from llmx.errors import UserError

BASE = {"trainer": {"max_steps": 5, "callbacks": [1, 2]}, "model": {"o": {"class_path": "A", "init_args": {"lr": 1}}}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def write(folder: Path, **content) -> str:
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "own.yaml")


def test_what_a_config_says_wins_and_the_rest_is_the_base(folder):
    read = read_config(write(folder, base="base.yaml", trainer={"max_steps": 7}, data={"window": 3}))
    assert read == {**BASE, "trainer": {"max_steps": 7, "callbacks": [1, 2]}, "data": {"window": 3}}


def test_lists_are_replaced_whole():
    assert merged(BASE, {"trainer": {"callbacks": [3]}})["trainer"]["callbacks"] == [3]


def test_arguments_of_the_same_class_are_kept_and_those_of_another_dropped():
    assert merged(BASE, {"model": {"o": {"init_args": {"b": 2}}}})["model"]["o"]["init_args"] == {"lr": 1, "b": 2}
    other = {"class_path": "B", "init_args": {"b": 2}}
    assert merged(BASE, {"model": {"o": other}})["model"]["o"] == other
    assert merged(BASE, {"model": {"o": None}})["model"]["o"] is None
    assert merged({"o": "A"}, {"o": {"init_args": {"b": 2}}}) == {"o": {"class_path": "A", "init_args": {"b": 2}}}


def test_merging_changes_neither():
    before = json.dumps(BASE)
    merged(BASE, {"trainer": {"max_steps": 1}, "model": {"o": {"init_args": {"b": 2}}}})
    assert json.dumps(BASE) == before


@pytest.mark.parametrize("content", [{"base": "none.yaml"}, {"base": "own.yaml"}])
def test_a_base_that_cannot_be_used_is_named(folder, capsys, content):
    path = write(folder, **content)
    with pytest.raises(UserError, match=r"^base: "):
        read_config(path)
    assert main(["fit", "--config", path]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: base: ")
    assert error.count("\n") == 1
