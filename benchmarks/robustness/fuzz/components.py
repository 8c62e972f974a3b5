"""Valid components with all of their arguments written out."""

from __future__ import annotations

from inspect import isabstract, signature
from typing import Any

from hypothesis import strategies as st

from llmx.config.factories import components_by_name
from llmx.parts.norm import Norm
from llmx.protocol import Block, Embedding, FeedForward, Head, Mixer, Network, Stack


def _slots() -> dict[str, list[type]]:
    """The components that fit each slot of a decoder."""
    kinds: dict[str, type] = {"mixer": Mixer, "feed_forward": FeedForward, "stack": Stack, "embedding": Embedding}
    kinds |= {"head": Head, "norm": Norm, "block": Block, "network": Network}
    found = components_by_name().values()
    return {slot: [c for c in found if issubclass(c, kind) and not isabstract(c)] for slot, kind in kinds.items()}


SLOTS = _slots()


@st.composite
def component(draw: st.DrawFn, slot: str) -> dict[str, Any]:
    """A valid component with all of its plain arguments written out, so that each can be spoiled."""
    cls = draw(st.sampled_from(SLOTS[slot]))
    given: dict[str, Any] = {}
    for name, parameter in list(signature(cls).parameters.items())[1:]:
        if name in ("vocab_size", "connection") or (slot in ("embedding", "head") and name == "dim"):
            continue
        if name == "blocks":
            given[name] = [draw(component("block").filter(lambda b: "Cycle" not in b["class_path"])) for _ in range(2)]
        elif name in ("mixer", "feed_forward") or (name in SLOTS and (slot == "block" or draw(st.booleans()))):
            given[name] = draw(component(name))
        elif name not in SLOTS and parameter.default is not parameter.empty:
            given[name] = {"heads": 2, "dim": 8, "depth": 2}.get(name, parameter.default)
        elif name == "window":
            given[name] = 8
    return {"class_path": cls.__name__, "init_args": given}


@st.composite
def decoders(draw: st.DrawFn) -> dict[str, Any]:
    """A valid Decoder of any components."""
    given: dict[str, Any] = {"dim": 8, "depth": 2, "tied": False, "dropout": 0.0, "block": draw(component("block"))}
    for slot in draw(st.lists(st.sampled_from(["stack", "embedding", "head", "norm"]), max_size=2, unique=True)):
        given[slot] = draw(component(slot))
    return {"class_path": "Decoder", "init_args": given}
