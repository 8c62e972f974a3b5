"""Values that are probably wrong, and nested data with such a value somewhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

GROUPS = ("model", "data", "trainer")

STRUCTURE = ("class_path", "init_args", *GROUPS)  # parts of a path that name nothing by themselves
# a larger number here only means more work or more processes
ENDLESS = {
    *("max_steps", "max_epochs", "min_steps", "min_epochs", "depth", "times", "streams", "experts", "tokens", "steps"),
    *("max_new_tokens", "samples", "devices", "num_nodes", "trials", "seeds", "shared", "order", "batch_size"),
}


def words(text: str) -> list[str]:
    return text.split("|")


# without dots and slashes, so that a drawn name never leads to a file of this machine
texts = st.text(st.characters(blacklist_characters="./\\~"), max_size=12)

ODD_TEXTS = words("| |é|null|nan|-1|1e400|true|[|{|a: b|-|--|nowhere|nowhere.yaml|nowhere/x.ckpt|/proc/nowhere")
ODD_TEXTS += ["corpus.txt", "lightning_logs", "\x00", "\N{COLLISION SYMBOL}", "\ud800", "x" * 5000]

CLASSES = words("Mixer|Attention|SwiGLU|RMSNorm|PreNormBlock|Decoder|AdamW|Cosine|llmx.protocol.Mixer")
CLASSES += words("torch.nn.Linear|builtins.dict|nowhere.Class|llmx|llmx.mixers|llmx.mixers.attention.Nothing|.|..")
CLASSES += words("a..b|torch.optim.SGD|functools.partial|int|collections.OrderedDict|Atention|pathlib.Path")

small_numbers = st.sampled_from([-(10**30), -(2**63), -7, -1, 0, 1, 2, 3])

numbers = st.one_of(
    st.sampled_from([-(10**30), -(2**63), -7, -1, 0, 1, 2, 3, 5, 7, 10**4, 10**6, 2**31, 10**10, 2**63, 10**30]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.5, -0.5, 1e-320, 1e308, 2.5]),
    st.integers(-100, 100),
    st.floats(width=32),
)

plain = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(ODD_TEXTS), texts)

components = st.one_of(
    st.sampled_from(CLASSES),
    st.builds(lambda name: {"class_path": name}, st.sampled_from([*CLASSES, None, 3, [], ""])),
    st.builds(lambda name, given: {"class_path": name, "init_args": given}, st.sampled_from(CLASSES), plain),
)

values = st.one_of(
    plain,
    plain,
    components,
    st.lists(plain, max_size=3),
    st.dictionaries(texts, plain, max_size=2),
    st.recursive(
        plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2), max_leaves=6
    ),
)


def value_for(key: str) -> st.SearchStrategy[Any]:
    """A value that is probably wrong for a key."""
    if key == "compile":
        return values.filter(lambda value: value is not True)
    if key in ENDLESS:
        odd: st.SearchStrategy[Any] = st.sampled_from(
            ["", "é", "null", "nan", "four", "[", None, True, False, float("nan"), float("inf"), 0.5, [], {}, [-1]]
        )
        return small_numbers.filter(lambda n: key not in ("devices", "num_nodes") or n < 2) | odd
    return values


@st.composite
def spoiled(draw: st.DrawFn, content: Any, times: int = 1) -> tuple[Any, list[str]]:
    """Nested data with `times` faults, and the names of which one must be in the message."""
    content = copy.deepcopy(content)
    names: list[str] = []
    for _ in range(times):
        places = list(_places(content, ()))
        plain_ones = [p for p in places if not isinstance(p[0][p[1]], dict | list) and p[1] != "class_path"]
        often = draw(st.integers(0, 2)) > 0
        chosen = plain_ones if plain_ones and often else places
        parent, key, path = draw(st.sampled_from(chosen))
        name = str(key)
        how = draw(st.sampled_from(["replace"] * 5 + ["remove", "misspell", "add", "wrap"]))
        if isinstance(parent, list):
            how = {"misspell": "replace", "add": "wrap"}.get(how, how)
        if how == "replace":
            number = isinstance(parent[key], int | float) and name not in ENDLESS and draw(st.booleans())
            parent[key] = draw(numbers if number else value_for(name))
        elif how == "remove":
            del parent[key]
        elif how == "misspell":
            at = draw(st.integers(0, len(name) - 1))
            wrong = draw(
                st.sampled_from(
                    [name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name.upper(), f" {name}"]
                )
            )
            parent[wrong] = parent.pop(key)
            names.append(wrong)
        elif how == "add":
            extra: Any = draw(texts | st.integers() | st.none() | st.booleans())
            parent[extra] = draw(values)
            names.append(extra if isinstance(extra, str) else json.dumps(extra))
        else:
            parent[key] = draw(st.sampled_from([[parent[key]], {name: parent[key]}, [parent[key]] * 2]))
        names += [
            {"None": "null", "True": "true", "False": "false"}.get(part, part)
            for part in path
            if not part.isdecimal() and part not in STRUCTURE
        ][-2:]
        names += [part for part in path[-1:] if part in GROUPS]
    return content, names


def _places(content: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, Any, tuple[str, ...]]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in pairs:
        yield content, key, (*path, str(key))
        yield from _places(inner, (*path, str(key)))
