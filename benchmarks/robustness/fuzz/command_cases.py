"""Cases whose command line is wrong: verbs, prompts, search spaces, descriptions."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from benchmarks.robustness.fuzz.case import Case, config, yaml_bytes
from benchmarks.robustness.fuzz.config_cases import NESTED
from benchmarks.robustness.fuzz.odd_values import numbers, spoiled, texts, value_for, values, words


@st.composite
def commands(draw: st.DrawFn) -> Case:
    """Verbs and flags that are unknown or incomplete."""
    verbs = words("fit|validate|test|predict|audit|describe|compare|sweep")
    word = st.one_of(
        st.sampled_from(
            [*verbs, "FIT", "fitt", "", "-", "--", "--config", "-c", "tiny.yaml", "--ckpt_path", "last", "é"]
        ),
        st.sampled_from(words("--version|--print_config|--trainer|--model|--data|--data.window|--seeds|--match|--to")),
        st.sampled_from(
            words("--config=|--config=nowhere.yaml|--config=tiny.yaml|--trust=|--trust=os,nowhere|--format=json")
        ),
        st.sampled_from(
            words("--config={|--config={}|--config=[1]|--model=3|--data=[]|--trainer=null|--data=tiny.yaml")
        ),
        st.sampled_from(
            ["--length=-1", "--length=x", "--vocab_size=0", "--by=dim", "--match=parameters", "--to=nowhere.yaml"]
        ),
        st.sampled_from(
            ["--model.network.block.blocks.0.mixer=GRU", "--trainer.callbacks+=Nothing", "--trainer.callbacks=3"]
        ),
        st.sampled_from(
            ["--model.network.help", "--data.split+=1", "--data.split=", "--data.split", "--trainer.max_steps=1"]
        ),
        texts,
    )
    arguments = draw(st.lists(word, max_size=4))
    if draw(st.booleans()):
        arguments = [draw(st.sampled_from(verbs)), *arguments]
    if "fit" in arguments or "sweep" in arguments:  # valid ones have to end soon
        arguments = [a for a in arguments if a != "--trainer"]
    known = words("config|command|sweep|compare|no such|ckpt_path|model|data|trainer|subcommand|trust|to:|by:")
    return Case("command", arguments, [*known, *(a for a in arguments if a.strip("-"))])


@st.composite
def predictions(draw: st.DrawFn) -> Case:
    """Prompts and sampling settings that are wrong."""
    options: dict[str, st.SearchStrategy[Any]] = {
        "data.prompts": st.sampled_from(
            [*words('café||the |prompts.txt|folder|[]|[""]|[1]|null|["the", ""]|nowhere.txt|{}'), "x" * 3000, "\ud800"]
        )
        | values,
        "data.samples": value_for("samples"),
        "model.sampling.max_new_tokens": value_for("max_new_tokens"),
        "data.batch_size": values,
        "data.window": values,
    }
    for key in ("temperature", "top_k", "top_p", "min_p", "seed", "speculate"):
        options[f"model.sampling.{key}"] = numbers | values
    keys = draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=2, unique=True))
    arguments = ["predict", "--ckpt_path", "last"]
    names = ["prompt"] if "data.prompts" in keys else []
    for key in keys:
        value = draw(options[key])
        text = value if isinstance(value, str) else json.dumps(value)
        arguments.append(f"--{key}={text}")
        names.append(key.split(".")[-1])
    odd = draw(st.sampled_from([b"", b"\n", b"\xff", b"the\n\nfox", b"the\n", "é".encode()]))
    return Case("predict", arguments, [*names, "window"], {"prompts.txt": odd, "folder": None})


@st.composite
def sweeps(draw: st.DrawFn) -> Case:
    """A search space that is wrong. A valid one has one trial."""
    key = draw(
        st.sampled_from(
            words("model.optimizer.init_args.lr|model.network.dimm|seed_everything||é|data.split.0|trainer.max_stepz")
        )
    )
    dimension = draw(
        st.sampled_from(
            [
                {"values": [1]},
                {"low": 1, "high": 2},
                {"low": 1e-3, "high": 1e-2, "log": True},
                {"low": 0.0, "high": 1.0, "step": 0.5},
            ]
        )
    )
    content, names = draw(spoiled({"space": {key: dimension}, "trials": 1, "prune": False}))
    arguments = ["sweep", "--config", "tiny.yaml", "--sweep", "space.yaml", "--trainer.logger=false", "--study=x"]
    arguments += draw(
        st.sampled_from(
            [
                x.split()
                for x in words(
                    "||--seeds=0|--seeds=x|--trials=-1|--ckpt_path=last|--trainer.devices=2|--storage=nowhere|"
                    "--storage=|--format=xml|--config=nowhere.yaml|--data.windows=3|--sweep=nowhere.yaml|"
                    "--sweep=lightning_logs"
                )
            ]
        )
    )
    raw = draw(
        st.sampled_from(
            [None] * 4
            + [b"", b"[1", b"\xff", b"space: &a [*a]", b"space: !!python/name:os.system", f"space: {NESTED}".encode()]
        )
    )
    named = [
        *names,
        key or "space",
        "model.",
        "data.",
        "space",
        "seeds",
        "trials",
        "ckpt_path",
        "devices",
        "storage",
        "format",
        "nowhere",
        "windows",
        "sweep",
        "lightning_logs",
    ]
    return Case("sweep", arguments, named, {"space.yaml": yaml_bytes(content) if raw is None else raw})


@st.composite
def matches(draw: st.DrawFn) -> Case:
    """`describe` and `describe --match` with wrong arguments."""
    other, names = draw(spoiled(config()))
    options: dict[str, st.SearchStrategy[Any]] = {
        "match": st.sampled_from(["parameters", "flops", "speed", ""]),
        "to": st.sampled_from(
            ["other.yaml", "other.yaml", "tiny.yaml", "nowhere.yaml", "lightning_logs", "corpus.txt", "", "null"]
        ),
        "by": st.sampled_from(
            ["dim", "heads", "hidden", "", ".", "nowhere", "model.network.block", "model.network.dim", "depth", "é"]
        ),
        "length": value_for("window"),
        "vocab_size": value_for("window"),
        "format": st.sampled_from(["json", "table", "xml", ""]),
        "ckpt_path": st.sampled_from(["last", "nowhere"]),
    }
    keys = draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True))
    given = {key: draw(options[key]) for key in keys}
    arguments = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return Case(
        "describe",
        ["describe", "--config", "tiny.yaml", *arguments],
        [*keys, *names, "to:", "to "],
        {"other.yaml": yaml_bytes(other)},
    )
