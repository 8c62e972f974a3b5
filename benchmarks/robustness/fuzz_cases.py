"""The cases of benchmarks/fuzz.py: each kind is a Hypothesis strategy that draws a command and the files it finds."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from inspect import isabstract, signature
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from llmx.config.factories import components_by_name
from llmx.parts.norm import Norm
from llmx.protocol import Block, Embedding, FeedForward, Head, Mixer, Network, Stack
from llmx.training.trainer import Trainer
from testbed.tiny import TEXT, network

GROUPS = ("model", "data", "trainer")
STRUCTURE = ("class_path", "init_args", *GROUPS)  # parts of a path that say nothing by themselves
# more of these is only more work, or more processes
ENDLESS = {
    *("max_steps", "max_epochs", "min_steps", "min_epochs", "depth", "times", "streams", "experts", "tokens", "steps"),
    *("max_new_tokens", "samples", "devices", "num_nodes", "trials", "seeds", "shared", "order", "batch_size"),
}


@dataclass(frozen=True)
class Case:
    """A command and the files that it finds; a refusal must have one of `names` in its message."""

    kind: str
    arguments: list[str]
    names: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)  # None: a folder


def config() -> dict[str, Any]:
    """What is valid, and takes a second."""
    return {
        "seed_everything": 3,
        "trainer": {
            "max_steps": 1,
            "val_check_interval": 1,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "precision": "32-true",
            "accelerator": "cpu",
        },
        "data": {"corpus": "corpus.txt", "window": 8, "batch_size": 4, "split": [0.8, 0.1, 0.1]},
        "model": {"network": network(depth=1), "sampling": {"max_new_tokens": 4}},
    }


# ---------------------------------------------------------------------------------------------------- what is drawn
def words(text: str) -> list[str]:
    return text.split("|")


# no dots and slashes: a name drawn by chance leads to no file of this machine
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
    """A value that is probably wrong there."""
    if key == "compile":
        return values.filter(lambda value: value is not True)
    if key in ENDLESS:
        odd: st.SearchStrategy[Any] = st.sampled_from(
            ["", "é", "null", "nan", "four", "[", None, True, False, float("nan"), float("inf"), 0.5, [], {}, [-1]]
        )
        return small_numbers.filter(lambda n: key not in ("devices", "num_nodes") or n < 2) | odd
    return values


def _slots() -> dict[str, list[type]]:
    """The components that stand in each place of a decoder."""
    kinds: dict[str, type] = {"mixer": Mixer, "feed_forward": FeedForward, "stack": Stack, "embedding": Embedding}
    kinds |= {"head": Head, "norm": Norm, "block": Block, "network": Network}
    found = components_by_name().values()
    return {slot: [c for c in found if issubclass(c, kind) and not isabstract(c)] for slot, kind in kinds.items()}


SLOTS = _slots()


@st.composite
def component(draw: st.DrawFn, slot: str) -> dict[str, Any]:
    """A valid component with all of its plain arguments written out, so that each can be spoilt."""
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
def spoilt(draw: st.DrawFn, content: Any, times: int = 1) -> tuple[Any, list[str]]:
    """Nested data with a fault, and the names of which one must be in the complaint."""
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


def written(content: Any) -> bytes:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")


VERBS = st.sampled_from(["fit", "fit", "fit", "validate", "test", "audit", "describe"])


def _args(verb: str, *more: str) -> list[str]:
    quiet = [] if verb == "describe" or "--trainer.logger" in more else ["--trainer.logger=false"]
    return [verb, "--config", "tiny.yaml", *quiet, *more]


# ------------------------------------------------------------------------------------------------------------ kinds
@st.composite
def configs(draw: st.DrawFn) -> Case:
    """A key of the config that is wrong, misspelt, missing or too many."""
    content, names = draw(spoilt(config(), draw(st.sampled_from([1, 1, 1, 2]))))
    logged = draw(st.booleans())
    verb = draw(VERBS)
    arguments = [verb, "--config", "tiny.yaml"] if logged else _args(verb)
    return Case("config", arguments, names or ["config"], {"tiny.yaml": written(content)})


@st.composite
def networks(draw: st.DrawFn) -> Case:
    """A network of any components, with one argument that is wrong."""
    content = config()
    cls = draw(st.sampled_from(["Decoder"] * 6 + ["NGram", "WindowMLP", "FoundingNetwork"]))
    net = draw(component("network").filter(lambda n: n["class_path"] == cls)) if cls != "Decoder" else draw(_decoders())
    net, names = draw(spoilt({"network": net}))
    content["model"] |= net
    names += ["network", "window"]  # which may not suit what was drawn
    return Case("network", _args(draw(VERBS)), names, {"tiny.yaml": written(content)})


@st.composite
def _decoders(draw: st.DrawFn) -> dict[str, Any]:
    given: dict[str, Any] = {"dim": 8, "depth": 2, "tied": False, "dropout": 0.0, "block": draw(component("block"))}
    for slot in draw(st.lists(st.sampled_from(["stack", "embedding", "head", "norm"]), max_size=2, unique=True)):
        given[slot] = draw(component(slot))
    return {"class_path": "Decoder", "init_args": given}


@st.composite
def flags(draw: st.DrawFn) -> Case:
    """An option with a value that is wrong, or that does not exist."""
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
    arguments = [verb, "--config", "tiny.yaml", *more] if key == "logger" else _args(verb, *more)
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
    """A config file that is no config."""
    how = draw(st.sampled_from(["known"] * 6 + ["bytes", "cut", "flip", "insert", "utf16", "folder", "bom", "append"]))
    valid = written(config())
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
    return Case("yaml", _args(draw(VERBS), *more), named, {"tiny.yaml": content})


@st.composite
def commands(draw: st.DrawFn) -> Case:
    """Verbs and flags that are none, or lack what belongs to them."""
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
    if "fit" in arguments or "sweep" in arguments:  # what happens to be valid ends soon
        arguments = [a for a in arguments if a != "--trainer"]
    known = words("config|command|sweep|compare|no such|ckpt_path|model|data|trainer|subcommand|trust|to:|by:")
    return Case("command", arguments, [*known, *(a for a in arguments if a.strip("-"))])


def _checkpoint(template: Path) -> tuple[bytes, dict[str, Any]]:
    path = template / "lightning_logs/version_0/checkpoints/best.ckpt"
    return path.read_bytes(), torch.load(path, weights_only=True)


@st.composite
def checkpoints(draw: st.DrawFn, template: Path) -> Case:
    """A checkpoint that is none, is damaged, or says other things."""
    data, content = _checkpoint(template)
    how = draw(
        st.sampled_from(["path", "bytes", "cut", "flip", "parts", "settings", "settings", "settings", "run", "config"])
    )
    verb = draw(st.sampled_from(["fit", "validate", "test", "predict", "audit", "describe", "warm"]))
    files: dict[str, bytes | None] = {}
    path = "odd.ckpt"
    names = ["ckpt_path", "warm_start", "odd.ckpt", "data.", "optimizer", "schedule"]
    if how == "path":
        path = draw(
            st.sampled_from(
                [
                    *words("nowhere.ckpt|.||last|corpus.txt|lightning_logs|tiny.yaml|/proc/self/mem|null|é|5"),
                    "x" * 300,
                    "\x00",
                ]
            )
        )
        names.append(path or "ckpt_path")
    elif how == "bytes":
        files[path] = draw(
            st.binary(max_size=50)
            | st.sampled_from([b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02.", b"\x80\x04N."])
        )
    elif how == "cut":
        files[path] = data[: draw(st.integers(0, len(data) - 1))]
    elif how == "flip":
        at = draw(st.integers(0, len(data) - 1))
        files[path] = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 4 :]
    elif how == "parts":
        part = draw(st.sampled_from(sorted(content)))
        content[part] = draw(st.sampled_from([None, 3, "x", [], {}, [1], {"a": 1}, torch.zeros(2)]))
        if draw(st.booleans()):
            del content[part]
        files[path] = _saved(content)
    elif how == "settings":
        part = draw(st.sampled_from(["hyper_parameters", "hyper_parameters", "datamodule_hyper_parameters"]))
        content[part], more = draw(spoilt(content[part]))
        names += [*more, part]
        files[path] = _saved(content)
    elif how == "run":
        path = "last"
        files["lightning_logs/version_0/config.yaml"] = draw(
            st.sampled_from([b"", b"[1", b"\xff", b"3", b"model: {network: os.system}", b"a: b"])
        )
        names += ["config", "version_0", "model"]
    else:
        path = "lightning_logs/version_0/checkpoints/best.ckpt"
        changed, more = draw(spoilt(yaml.safe_load((template / "lightning_logs/version_0/config.yaml").read_text())))
        files["lightning_logs/version_0/config.yaml"] = written(changed)
        names += [*more, "config", "version_0", "model"]
    if verb == "warm":
        return Case("checkpoint", _args("fit", f"--model.warm_start={path}"), names, files)
    arguments = [verb, f"--ckpt_path={path}"]
    if verb == "fit":
        arguments += ["--trainer.max_steps=2"]
    if draw(st.integers(0, 3)) == 0:
        arguments += ["--config", "tiny.yaml"]
    return Case("checkpoint", arguments, names, files)


def _saved(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@st.composite
def predictions(draw: st.DrawFn) -> Case:
    """Prompts and sampling that cannot be."""
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
    """A search space that is none. What is left of a valid one is one trial."""
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
    content, names = draw(spoilt({"space": {key: dimension}, "trials": 1, "prune": False}))
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
    return Case("sweep", arguments, named, {"space.yaml": written(content) if raw is None else raw})


@st.composite
def comparisons(draw: st.DrawFn, template: Path) -> Case:
    """Runs that are none, or have files that were changed."""
    folder = "lightning_logs/version_0"
    name = draw(st.sampled_from(["config.yaml", "run.json", "metrics.json", "val_losses.npy"]))
    files: dict[str, bytes | None] = {}
    names = [folder, name]
    if name == "val_losses.npy" or draw(st.booleans()):
        files[f"{folder}/{name}"] = draw(
            st.sampled_from([b"", b"{}", b"[]", b"3", b"null", b"[1", b"\xff", None, NESTED.encode()])
        )
    else:
        content, more = draw(spoilt(yaml.safe_load((template / folder / name).read_text())))
        files[f"{folder}/{name}"] = json.dumps(content).encode() if name.endswith("json") else written(content)
        names += more
    runs = draw(
        st.sampled_from(
            [[folder]] * 6
            + [["lightning_logs"], [folder, folder], [], ["nowhere"], ["*"], [""], ["corpus.txt"], ["["], ["\x00"]]
        )
    )
    more = draw(
        st.sampled_from(
            [[]] * 5
            + [
                x.split()
                for x in words(
                    "--baseline=x|--out=corpus.txt|--out=|--out=/proc/x|--at-equal=flops|--at-equal=x|--format=x|--x"
                )
            ]
        )
    )
    named = [*names, *runs, "compare", "baseline", "corpus.txt", "/proc/x", "run"]
    return Case("compare", ["compare", *runs, *more], named, files)


@st.composite
def matches(draw: st.DrawFn) -> Case:
    """describe, and describe --match, of what cannot be described or matched."""
    other, names = draw(spoilt(config()))
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
        {"other.yaml": written(other)},
    )


@st.composite
def corpora(draw: st.DrawFn) -> Case:
    """Texts and token files that cannot be read, are too short, or are something else."""
    text = draw(
        st.sampled_from(
            [
                b"",
                b"x",
                b"xx",
                TEXT[:9].encode(),
                b"\xff\xfe",
                b"\x00" * 500,
                "é".encode() * 300,
                bytes(range(256)) * 3,
                b"\xf0\x9f\x98\x80" * 99,
                None,
            ]
        )
        | st.binary(max_size=300)
    )
    tokenizer = draw(
        st.sampled_from(
            [
                b'{"kind": "byte"}',
                b"{}",
                b"",
                b"[1]",
                b'{"kind": 3}',
                b'{"kind": "character"}',
                b'{"kind": "character", "vocabulary": "aa"}',
                b'{"kind": "character", "vocabulary": ["a"]}',
                b"\xff",
                b'{"kind": "byte", "x": 1}',
                None,
            ]
        )
    )
    files: dict[str, bytes | None] = {
        "text.txt": text,
        "tokens/tokenizer.json": tokenizer,
        "tokens/a.bin": draw(st.binary(max_size=99)) * 9,
    }
    if draw(st.booleans()):
        files["tokens/b.npy"] = draw(
            st.binary(max_size=9)
            | st.sampled_from(
                [b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", b"\x93NUMPY"]
            )
        )
    corpus = draw(
        st.sampled_from(["text.txt", "text.txt", "tokens", "nowhere.txt", "lightning_logs", "", ".", "stdlibb"])
    )
    more = draw(
        st.sampled_from(
            [
                x.split()
                for x in words(
                    "||--data.tokenizer=byte|--data.tokenizer=character|--data.split=[1,0,0]|--data.split=[0,0,1]|"
                    "--data.split=[0,1,0]|--data.val_stride=3|--vocab_size=5"
                )
            ]
        )
    )
    return Case(
        "corpus",
        _args(draw(VERBS), f"--data.corpus={corpus}", *more),
        ["data.", "corpus", "vocab_size", corpus or "corpus", "token"],
        files,
    )


def kinds(template: Path) -> dict[str, tuple[int, Callable[[], st.SearchStrategy[Case]]]]:
    """Every kind with its share."""
    return {
        "config": (5, configs),
        "network": (5, networks),
        "flag": (5, flags),
        "yaml": (3, yaml_files),
        "command": (2, commands),
        "checkpoint": (3, partial(checkpoints, template)),
        "predict": (2, predictions),
        "sweep": (1, sweeps),
        "compare": (1, partial(comparisons, template)),
        "describe": (2, matches),
        "corpus": (2, corpora),
    }
