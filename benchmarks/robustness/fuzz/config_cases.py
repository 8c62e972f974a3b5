"""Cases whose config is wrong: a key, a network, a flag, the whole file."""

from __future__ import annotations

import json
from inspect import signature

from hypothesis import strategies as st

from benchmarks.robustness.fuzz.case import VERBS, Case, command_line, config, yaml_bytes
from benchmarks.robustness.fuzz.components import component, decoders
from benchmarks.robustness.fuzz.odd_values import spoiled, value_for, words
from llmx.training.trainer import Trainer


@st.composite
def configs(draw: st.DrawFn) -> Case:
    """A config with a key that is wrong, misspelled, missing or unknown."""
    content, names = draw(spoiled(config(), draw(st.sampled_from([1, 1, 1, 2]))))
    logged = draw(st.booleans())
    verb = draw(VERBS)
    arguments = [verb, "--config", "tiny.yaml"] if logged else command_line(verb)
    return Case("config", arguments, names or ["config"], {"tiny.yaml": yaml_bytes(content)})


@st.composite
def networks(draw: st.DrawFn) -> Case:
    """A network of any components with one wrong argument."""
    content = config()
    cls = draw(st.sampled_from(["Decoder"] * 6 + ["NGram", "WindowMLP", "FoundingNetwork"]))
    net = draw(component("network").filter(lambda n: n["class_path"] == cls)) if cls != "Decoder" else draw(decoders())
    net, names = draw(spoiled({"network": net}))
    content["model"] |= net
    names += ["network", "window"]  # the drawn network may not suit the window
    return Case("network", command_line(draw(VERBS)), names, {"tiny.yaml": yaml_bytes(content)})


@st.composite
def flags(draw: st.DrawFn) -> Case:
    """A flag that is unknown or has a wrong value."""
    groups: dict[str, list[str]] = {
        "trainer.": list(signature(Trainer).parameters),
        "data.": [
            *config()["data"],
            *("root", "offline_corpus", "tokenizer", "sampling", "seed", "val_stride", "val_count"),
        ],
        "model.": words("optimizer|schedule|weight_decay_on|compile|audit|gradient_checkpointing|warm_start"),
        "model.sampling.": ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "speculate"],
        "model.optimizer.": ["lr", "betas", "weight_decay", "eps", "fused", "foreach", "maximize"],
        "model.schedule.": ["warmup_steps", "minimum_ratio"],
        "model.network.": words("dim|depth|block|dropout|tied|head|stack.times|block.mixer.heads|0|block.0"),
        "": words("seed_everything|vocab_size|ckpt_path|trust|config|data.split.0|data.split.7|weights_only"),
    }
    group = draw(st.sampled_from([*groups, "trainer.", "trainer."]))
    key = draw(st.sampled_from(groups[group]))
    value = draw(value_for(key.rsplit(".", 1)[-1]))
    text = value if isinstance(value, str) else json.dumps(value)
    option = draw(st.sampled_from([f"{group}{key}"] * 8 + [f"{group}{key}x", f"{group}{key}.x", f"{group}x.{key}"]))
    more = [f"--{option}={text}"] if draw(st.booleans()) else [f"--{option}", text]
    names = [part for part in option.split(".") if not part.isdecimal()][-2:]
    names += [text] if text else []
    names += ["no such key"] if key == "config" else []
    verb = draw(VERBS)
    arguments = [verb, "--config", "tiny.yaml", *more] if key == "logger" else command_line(verb, *more)
    return Case("flag", arguments, names)


NESTED = "[" * 3000 + "]" * 3000
BROKEN = {
    "empty": "",
    "scalar": "5",
    "text": "fit",
    "list": "- 1\n- 2",
    "comment": "# nothing",
    "null": "null",
    "bracket": "model: [1, 2",
    "tab": "model:\n\tnetwork: 3",
    "tag": "model: !!python/object/apply:os.getcwd []",
    "own tag": "model: !mine {a: 1}",
    "set": "model: !!set {a, b}",
    "binary": "data: !!binary aGVsbG8=",
    "date": "data: {window: 2020-01-01}",
    "duplicate": "data: {window: 8}\ndata: {window: 9}",
    "alias": "model: *nowhere",
    "recursion": "model: &a {network: *a}",
    "list recursion": "data: &a [*a]",
    "laughs": "a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n"
    "c: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\nmodel: [*d, *d, *d, *d]",
    "merge": "data: {<<: {window: 8}, batch_size: x}",
    "merge of nothing": "data: {<<: 3}",
    "documents": "data: {window: 8}\n---\nmodel: {}",
    "nested": f"model: {NESTED}",
    "nested mappings": "model: " + "{a: " * 1500 + "1" + "}" * 1500,
    "key of a list": "? [1, 2]\n: 3",
    "key of a mapping": "? {a: 1}\n: 3",
    "numeric key": "3: 4",
    "null key": "null: 4",
    "no key": ": 4",
    "base missing": "base: nowhere.yaml",
    "base itself": "base: tiny.yaml",
    "base folder": "base: .",
    "base list": "base: [1]",
    "base null": "base: null",
    "base binary": "base: corpus.txt",
    "base checkpoint": "base: lightning_logs/version_0/checkpoints/best.ckpt",
    "long key": "x" * 100_000 + ": 1",
    "huge number": "data: {window: " + "9" * 5000 + "}",
    "model null": "model:",
    "network null": "model: {network: }",
    "trainer list": "trainer: [1]",
    "data file": "data: tiny.yaml",
    "model file": "model: nowhere.yaml",
    "control": "model: \x01",
    "percent": "%YAML 9.9\n---\nmodel: {}",
}


@st.composite
def yaml_files(draw: st.DrawFn) -> Case:
    """A file that is no config."""
    how = draw(st.sampled_from(["known"] * 6 + ["bytes", "cut", "flip", "insert", "utf16", "folder", "bom", "append"]))
    valid = yaml_bytes(config())
    content: bytes | None
    if how == "known":
        content = BROKEN[draw(st.sampled_from(sorted(BROKEN)))].encode()
        if draw(st.booleans()):
            content = valid + b"\n" + content
    elif how == "bytes":
        content = draw(st.binary(max_size=60))
    elif how == "cut":
        content = valid[: draw(st.integers(0, len(valid)))]
    elif how == "flip":
        at = draw(st.integers(0, len(valid) - 1))
        content = valid[:at] + draw(st.binary(min_size=1, max_size=1)) + valid[at + 1 :]
    elif how in ("insert", "append"):
        at = draw(st.integers(0, len(valid))) if how == "insert" else len(valid)
        odd = draw(st.sampled_from([*b"!! & * | > % @ ` { ] \xff".split(), b"\t", b"\n", b": ", b"- ", b"? "]))
        content = valid[:at] + odd + valid[at:]
    elif how == "utf16":
        content = valid.decode().encode("utf-16")
    elif how == "bom":
        content = b"\xef\xbb\xbf" + valid
    else:
        content = None
    more = draw(
        st.sampled_from(
            [[], [], ["--data.window", "8"], ["--model.network.block.blocks.0.mixer", "GRU"], ["--data.split.1", "0.1"]]
        )
    )
    named = ["config", "tiny.yaml", "base", "no such key", "model", "data.", "trainer"]
    return Case("yaml", command_line(draw(VERBS), *more), named, {"tiny.yaml": content})
