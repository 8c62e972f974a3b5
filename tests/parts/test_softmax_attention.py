"""The base of the softmax attention mixers: what every mixer on it inherits."""

import importlib
import inspect
import pkgutil

import pytest

import llmx.mixers
from llmx.parts.softmax_attention import SoftmaxAttention
from llmx.protocol import Site

for found in pkgutil.iter_modules(llmx.mixers.__path__):
    importlib.import_module(f"llmx.mixers.{found.name}")
MIXERS = [cls for cls in SoftmaxAttention.__subclasses__() if cls.__module__.startswith("llmx.mixers.")]
GROUPED = [cls for cls in MIXERS if "kv_heads" in inspect.signature(cls).parameters]


def test_the_base_is_abstract_and_its_mixers_are_final():
    with pytest.raises(TypeError, match="abstract"):
        SoftmaxAttention(Site(dim=16), heads=4)
    assert len(MIXERS) > 10
    heirs = [heir for cls in MIXERS for heir in cls.__subclasses__()]
    assert [heir for heir in heirs if heir.__module__.startswith("llmx.")] == []


@pytest.mark.parametrize("cls", MIXERS, ids=lambda cls: cls.__name__)
def test_a_mixer_states_its_arguments_and_names_heads_that_do_not_divide(cls):
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    for heads in (0, -1, 3):
        with pytest.raises(ValueError, match=r"^heads: .*dim 16"):
            cls(Site(dim=16), heads=heads)


@pytest.mark.parametrize("cls", GROUPED, ids=lambda cls: cls.__name__)
def test_kv_heads_that_do_not_divide_the_heads_are_named(cls):
    for kv_heads in (0, -1, 3, 8):
        with pytest.raises(ValueError, match=r"^kv_heads: .*heads 4"):
            cls(Site(dim=16), heads=4, kv_heads=kv_heads)


@pytest.mark.parametrize("cls", GROUPED, ids=lambda cls: cls.__name__)
def test_the_cache_has_a_slot_a_key_value_head_for_each_position_or_for_the_window(cls):
    made = cls(Site(dim=32), heads=4, kv_heads=2)
    state = made.init_state(3, 10)
    slots = min(10, getattr(made, "window", 10))
    assert state.key.shape == state.value.shape == (3, 2, slots, 8)
