"""Whether two runs are equal, bit by bit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.util.tensor_util import make_ndarray

from llmx.runs.archive import read_checkpoint

_PLUGINS = ("scalars", "text", "images", "custom_scalars")
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every curve that a resumed run cuts

TIMED = {  # these depend on the clock and the memory: equal runs differ in them
    *("seconds", "peak_bytes", "generated_tokens_per_second", "steps_in_these_seconds"),
    *("train/tokens_per_second", "final/seconds"),
}


def differences(run: Path, other: Path) -> str:
    """Says where two runs differ: weights, optimizer, schedule, progress, curves, samples, final metrics and losses.

    Returns one clause for each part that differs, with its first difference; "" for equal runs. Times do not count.
    """
    mine, theirs = ({name: read(folder.resolve()) for name, read in _PARTS.items()} for folder in (run, other))
    return "; ".join(_where(name, mine[name], theirs[name]) for name in _PARTS if not _same(mine[name], theirs[name]))


def _checkpoint(run: Path, *parts: str) -> Any:
    checkpoint = read_checkpoint(run / "checkpoints/last.ckpt")
    return {part: _placeless(checkpoint[part]) for part in parts}


def _progress(run: Path) -> Any:
    progress = _checkpoint(run, "global_step", "epoch", "loops")
    # Lightning's totals and started epochs also count work that a killed process lost: only "current" is compared
    loops = progress["loops"]["fit_loop"]
    progress["loops"] = {name: loop["current"] for name, loop in loops.items() if name.endswith("batch_progress")}
    return progress


def _curves(run: Path) -> Any:
    """Numbers, texts and images as TensorBoard shows them, by tag and step."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"tensors": 0}, tensor_size_guidance=dict.fromkeys(_PLUGINS, 0))
    events.Reload()
    tags = {*events.Tags()["tensors"]} - TIMED
    shown = {tag: [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)] for tag in tags}
    return {tag: points for tag, points in shown.items() if not tag.startswith("_hparams_")}


def _metrics(run: Path) -> Any:
    return {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k not in TIMED}


_PARTS: dict[str, Callable[[Path], Any]] = {
    "weights": lambda run: _checkpoint(run, "state_dict"),
    "optimizer and schedule": lambda run: _checkpoint(run, "optimizer_states", "lr_schedulers"),
    "progress": _progress,
    "callbacks": lambda run: _checkpoint(run, "callbacks"),
    "curves": _curves,
    "metrics.json": _metrics,
    "val_losses.npy": lambda run: (run / "val_losses.npy").read_bytes(),
    "files of checkpoints": lambda run: sorted(path.name for path in (run / "checkpoints").iterdir()),
}


def _placeless(value: Any) -> Any:
    """The value with its paths relative to the run's folder."""
    if isinstance(value, str):
        return re.sub(r"^\S*/version_\d+/", "", value)
    if isinstance(value, dict):
        return {_placeless(key): _placeless(item) for key, item in value.items()}
    return [_placeless(item) for item in value] if isinstance(value, list | tuple) else value


def _where(name: str, one: Any, other: Any) -> str:
    """The first place where two values differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{name}: {one} instead of {other}"[:400]
    key = next(key for key in {**one, **other} if key not in one or key not in other or not _same(one[key], other[key]))
    return _where(f"{name}, {key}", one.get(key), other.get(key))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
