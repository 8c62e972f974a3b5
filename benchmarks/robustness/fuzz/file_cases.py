"""Cases whose files are wrong: checkpoints, runs, corpora."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from benchmarks.robustness.fuzz.case import VERBS, Case, command_line, yaml_bytes
from benchmarks.robustness.fuzz.config_cases import NESTED
from benchmarks.robustness.fuzz.odd_values import spoiled, words
from testbed.tiny import TEXT


def _checkpoint(template: Path) -> tuple[bytes, dict[str, Any]]:
    """A checkpoint as bytes and as data."""
    path = template / "lightning_logs/version_0/checkpoints/best.ckpt"
    return path.read_bytes(), torch.load(path, weights_only=True)


@st.composite
def checkpoints(draw: st.DrawFn, template: Path) -> Case:
    """A checkpoint that is missing, damaged, or has other content."""
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
        files[path] = _checkpoint_bytes(content)
    elif how == "settings":
        part = draw(st.sampled_from(["hyper_parameters", "hyper_parameters", "datamodule_hyper_parameters"]))
        content[part], more = draw(spoiled(content[part]))
        names += [*more, part]
        files[path] = _checkpoint_bytes(content)
    elif how == "run":
        path = "last"
        files["lightning_logs/version_0/config.yaml"] = draw(
            st.sampled_from([b"", b"[1", b"\xff", b"3", b"model: {network: os.system}", b"a: b"])
        )
        names += ["config", "version_0", "model"]
    else:
        path = "lightning_logs/version_0/checkpoints/best.ckpt"
        changed, more = draw(spoiled(yaml.safe_load((template / "lightning_logs/version_0/config.yaml").read_text())))
        files["lightning_logs/version_0/config.yaml"] = yaml_bytes(changed)
        names += [*more, "config", "version_0", "model"]
    if verb == "warm":
        return Case("checkpoint", command_line("fit", f"--model.warm_start={path}"), names, files)
    arguments = [verb, f"--ckpt_path={path}"]
    if verb == "fit":
        arguments += ["--trainer.max_steps=2"]
    if draw(st.integers(0, 3)) == 0:
        arguments += ["--config", "tiny.yaml"]
    return Case("checkpoint", arguments, names, files)


def _checkpoint_bytes(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@st.composite
def comparisons(draw: st.DrawFn, template: Path) -> Case:
    """Runs that are missing or whose files were changed."""
    folder = "lightning_logs/version_0"
    name = draw(st.sampled_from(["config.yaml", "run.json", "metrics.json", "val_losses.npy"]))
    files: dict[str, bytes | None] = {}
    names = [folder, name]
    if name == "val_losses.npy" or draw(st.booleans()):
        files[f"{folder}/{name}"] = draw(
            st.sampled_from([b"", b"{}", b"[]", b"3", b"null", b"[1", b"\xff", None, NESTED.encode()])
        )
    else:
        content, more = draw(spoiled(yaml.safe_load((template / folder / name).read_text())))
        files[f"{folder}/{name}"] = json.dumps(content).encode() if name.endswith("json") else yaml_bytes(content)
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
def corpora(draw: st.DrawFn) -> Case:
    """Texts and token files that cannot be read, are too short, or are no text."""
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
        command_line(draw(VERBS), f"--data.corpus={corpus}", *more),
        ["data.", "corpus", "vocab_size", corpus or "corpus", "token"],
        files,
    )
