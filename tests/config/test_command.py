"""A command line, read once."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmx.config.command import Command, config_arguments
from llmx.errors import UserError

CONFIG = {"data": {"window": 3}, "model": {"blocks": [{"class_path": "A", "init_args": {"heads": 1}}, "B"]}}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 5}}))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **CONFIG}))
    return str(tmp_path / "own.yaml")


@pytest.mark.parametrize("form", ["{0} {1}", "{0}={1}"])
@pytest.mark.parametrize("name", ["--config", "-c"])
def test_a_config_is_read_with_its_base_and_the_flags_stay_as_typed(path, form, name):
    command = Command.read(["fit", *form.format(name, path).split(" ", 1), "--other", "x"])
    assert command.verb == "fit"
    assert command.configs == ({"trainer": {"max_steps": 5}, **CONFIG},)
    assert command.flags == ("--other", "x")
    assert json.loads(command.words()[2]) == command.config


def test_configs_come_before_the_flags_which_win_over_them(path):
    command = Command.read(["fit", "--data.window", "7", "--config", path])
    assert command.words()[-2:] == ["--data.window", "7"]
    assert command.given()["data"] == {"window": 7}


def test_later_configs_win_over_earlier_ones():
    command = Command.read(["fit", "--config", '{"a": 1, "b": 1}', "--config={a: 2}"])
    assert command.config == {"a": 2, "b": 1}


def test_a_list_entry_changes_the_last_config_alone(path):
    words = ["fit", "-c", path, "--config", json.dumps(CONFIG), "--model.blocks.0.heads", "4", "--model.blocks.1=C"]
    command = Command.read(words).with_entries()
    assert command.configs[0]["model"] == CONFIG["model"]
    assert command.configs[1]["model"]["blocks"] == [{"class_path": "A", "init_args": {"heads": 4}}, "C"]
    assert command.entries == ()


def test_an_alias_of_yaml_is_a_copy_whose_twin_stays_as_it_is():
    config = "{block: &b {class_path: A, init_args: {heads: 1}}, blocks: [*b, *b]}"
    (changed,) = Command.read(["fit", "--config", config, "--blocks.1.heads", "4"]).with_entries().configs
    assert [block["init_args"]["heads"] for block in changed["blocks"]] == [1, 4]
    assert changed["block"]["init_args"]["heads"] == 1


def test_a_list_entry_without_a_config_is_left_to_the_parser():
    command = Command.read(["fit", "--a.0.b", "4"]).with_entries()
    assert command.words() == ["fit", "--a.0.b=4"]


def test_an_index_beyond_the_list_is_named():
    with pytest.raises(UserError, match=r"^model.blocks.2: the last index of the list is 1$"):
        Command.read(["fit", "--config", json.dumps(CONFIG), "--model.blocks.2.heads", "4"]).with_entries()


def test_the_last_value_of_a_flag_counts_and_can_be_replaced():
    command = Command.read(["fit", "--ckpt_path", "a", "--x=1", "--ckpt_path=b", "--help"])
    assert command.flag("--ckpt_path") == "b"
    assert command.flag("--help") is None
    assert command.having("--ckpt_path", "c").flags == ("--x=1", "--help", "--ckpt_path=c")
    assert command.without("--x").flags == ("--ckpt_path", "a", "--ckpt_path=b", "--help")


def test_the_values_of_config_are_found_without_reading_them():
    assert config_arguments(["python", "main.py", "fit", "--config", "a.yaml", "-c=b.yaml"]) == ["a.yaml", "b.yaml"]


word = st.text(st.characters(codec="utf-8", exclude_characters="="), min_size=1, max_size=8)


@given(st.lists(st.tuples(st.from_regex(r"--[a-z]{1,6}(\.[a-z]{1,4})?", fullmatch=True), st.none() | word)))
def test_flags_without_a_config_come_out_as_they_went_in(flags):
    words = ["fit", *(name if value is None else f"{name}={value}" for name, value in flags if name != "--config")]
    assert Command.read(words).words() == words
