"""Components as plain data, and what data may not do."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.config.factories import find_class, from_config, to_config
from llmx.errors import UserError
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm

BLOCK = partial(
    PreNormBlock,
    mixer=partial(Attention, heads=2, kv_heads=1),
    feed_forward=partial(SwiGLU, hidden=20),
    norm=partial(RMSNorm, eps=1e-6),
)
WRITTEN = """
class_path: llmx.networks.decoder.Decoder
init_args:
  dim: 16
  depth: 2
  block:
    class_path: llmx.blocks.prenorm.PreNormBlock
    init_args:
      mixer: {class_path: llmx.mixers.attention.Attention, init_args: {heads: 2, kv_heads: 1}}
      feed_forward: {class_path: llmx.feedforward.swiglu.SwiGLU, init_args: {hidden: 20}}
      norm: {class_path: llmx.parts.norm.RMSNorm, init_args: {eps: 1.0e-6}}
"""

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_plain_data_stays_as_it_is_in_both_directions(data: Any):
    assert to_config(data) == data
    if "class_path" not in str(data):
        assert from_config(data) == data


def test_nested_factories_become_json():
    config = to_config({"block": BLOCK, "norms": [RMSNorm, (RMSNorm, 3)], "dim": 16})
    assert json.loads(json.dumps(config)) == config
    assert config["block"]["class_path"] == "llmx.blocks.prenorm.PreNormBlock"
    assert config["block"]["init_args"]["mixer"]["init_args"] == {"heads": 2, "kv_heads": 1}
    assert config["norms"] == [
        {"class_path": "llmx.parts.norm.RMSNorm"},
        [{"class_path": "llmx.parts.norm.RMSNorm"}, 3],
    ]


@pytest.mark.parametrize("value", [BLOCK, RMSNorm, [BLOCK, [RMSNorm]], {"a": {"b": BLOCK}, "c": None}])
def test_factories_read_from_data_are_written_as_the_same_data(value: Any):
    config = to_config(value)
    assert to_config(from_config(config)) == config
    assert to_config(config) == config


def test_read_factories_carry_class_and_arguments():
    block = from_config(to_config([BLOCK]))[0]
    assert block.func is PreNormBlock
    assert block.keywords["mixer"].func is Attention
    assert block.keywords["mixer"].keywords == {"heads": 2, "kv_heads": 1}
    assert from_config({"class_path": "llmx.parts.norm.RMSNorm", "init_args": None}).keywords == {}


def test_yaml_and_partials_build_the_same_network():
    torch.manual_seed(0)
    from_partials = partial(Decoder, dim=16, depth=2, block=BLOCK)(vocab_size=7)
    torch.manual_seed(0)
    from_yaml = from_config(yaml.safe_load(WRITTEN))(vocab_size=7)
    assert str(from_yaml) == str(from_partials)
    assert_close(dict(from_yaml.state_dict()), dict(from_partials.state_dict()), rtol=0, atol=0)
    tokens = torch.randint(7, (2, 5))
    assert_close(from_yaml(tokens), from_partials(tokens), rtol=0, atol=0)
    assert to_config(partial(Decoder, dim=16, depth=2, block=BLOCK)) == yaml.safe_load(WRITTEN)


class Outer:
    class Inner:
        pass


def local_class() -> type:
    class Local:
        pass

    return Local


@pytest.mark.parametrize(
    "value",
    [
        lambda site: None,
        len,
        RMSNorm(4),
        torch.zeros(2),
        partial(RMSNorm, 4),
        partial(len),
        partial(PreNormBlock, mixer=lambda site: None),
        [RMSNorm, lambda site: None],
        {"class_path": "x", "init_args": {"f": print}},
        torch.float32,
        Path("x"),
    ],
)
def test_what_has_no_name_to_be_found_by_is_refused(value: Any):
    with pytest.raises(UserError, match=r"cannot write .* into a checkpoint"):
        to_config(value)


@pytest.mark.parametrize("value", [local_class(), Outer.Inner, partial(local_class())])
def test_a_class_is_either_refused_or_found_again(value: Any):
    try:
        config = to_config(value)
    except UserError:
        return
    assert isinstance(from_config(config), partial)


@pytest.mark.parametrize("missing", ["llmx.parts.norm.RMSNrom", "llmx.parts.nrom.RMSNorm", "torch.optim.AdamX"])
def test_an_unknown_class_is_named(missing: str):
    with pytest.raises(UserError, match=missing):
        from_config({"block": [{"class_path": missing}]})


@pytest.mark.parametrize("path", ["llmx.parts.rotary.rotate", "llmx.parts.norm", "llmx.protocol.IGNORE"])
def test_only_classes_are_found(path: str):
    with pytest.raises(UserError, match="has no class"):
        find_class(path)


def test_a_bare_name_is_refused_with_its_name():
    with pytest.raises(UserError, match="'Decoder'"):
        from_config({"class_path": "Decoder"})


def test_classes_of_llmx_torch_optim_and_imported_modules_are_found():
    assert find_class("llmx.parts.norm.RMSNorm") is RMSNorm
    assert find_class("torch.optim.AdamW") is torch.optim.AdamW
    assert find_class(f"{__name__}.Outer") is Outer


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path that leaves a mark when it is executed; returns the place of the mark."""
    mark = tmp_path / "executed"
    (tmp_path / "stranger_on_the_path.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger_on_the_path", raising=False)
    return mark


def test_a_class_of_a_module_not_imported_is_refused_and_its_module_not_executed(stranger: Path):
    config = {
        "class_path": "llmx.parts.norm.RMSNorm",
        "init_args": {"x": [{"class_path": "stranger_on_the_path.Thing"}]},
    }
    with pytest.raises(UserError, match=r"stranger_on_the_path\.Thing.*import 'stranger_on_the_path' first"):
        from_config(config)
    assert not stranger.exists()
    assert "stranger_on_the_path" not in sys.modules


def test_a_class_of_an_imported_module_is_found(stranger: Path, monkeypatch: pytest.MonkeyPatch):
    importlib.import_module("stranger_on_the_path")
    factory = from_config({"a": {"class_path": "stranger_on_the_path.Thing"}})["a"]
    monkeypatch.delitem(sys.modules, "stranger_on_the_path")  # other tests find it as it was
    assert stranger.exists()
    assert type(factory()).__name__ == "Thing"
