"""What a run keeps of itself: configuration, record, final numbers and validation losses, written and read.

`begin_run`, `continue_run` and `end_run` write what a fit hands over as plain values. `read_run` reads any run,
`read_finished_run` one whose files are complete and agree with each other.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llmx.config.command import config_arguments
from llmx.config.yaml import parse_yaml, read_yaml
from llmx.errors import UserError, one_line
from llmx.runs.folder import CONFIG, METRICS, PREDICTIONS, RECORD, VAL_LOSSES, last_checkpoint, write_json

Curve = list[tuple[int, float]]  # (step, value)
# what losses were measured on: keys of the record's `data`
PROTOCOL = ("corpus", "sha256", "split", "vocab_size", "window", "val_stride", "val_count")
# what is read of each file, by key
REQUIRED: dict[str, dict[str, Any]] = {
    RECORD: {
        "command": list,
        "parameters": int,
        "network.groups.*.parameters": int,
        "network.training_flops_per_token": int | float | None,
        "network.state_bytes": int | None,
        **{f"data.{key}": object for key in PROTOCOL},
    },
    METRICS: {
        "val/loss": int | float,
        "tokens": int | None,
        "step": int,
        "seconds": int | float,
        "peak_bytes": int | None,
        "generated_tokens_per_second": int | float | None,
        "leaking": bool,
    },
    CONFIG: {"model.network": str | dict, "trainer": dict | None},
}
# runs of earlier versions lack these keys; missing keys count as unknown
OPTIONAL: dict[str, dict[str, Any]] = {
    RECORD: {
        "audit": dict | None,
        "leaking": bool,
        "blind": dict | None,
        "precision": str,
        "code": str,
        "sources": dict,
        "warm_start": dict | None,
        "continued": dict,
        "continued.*.config": dict,
        "continued.*.config.trainer": dict | None,
        "continued.*.code": str,
        "continued.*.sources": dict,
    },
    METRICS: {"steps_in_these_seconds": int},
    CONFIG: {},
}
AGREE = 1e-4  # nats between val/loss and the mean of the validation losses (float32), both of one validation


@dataclass(frozen=True)
class Run:
    """One fit, as its folder tells. `metrics` is empty until the run has ended."""

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        """The config files of the command line, as in `lstm + ingredients/muon`, else the class of the network."""
        given = config_arguments([str(word) for word in self.record["command"]])
        files = [Path(value).with_suffix("") for value in given if not value.lstrip().startswith("{")]
        if files:
            names = (x.as_posix().rpartition("configs/")[2] if "configs" in x.parts else x.name for x in files)
            return " + ".join(names)
        network = self.config["model"]["network"]
        return (network["class_path"] if isinstance(network, dict) else network).rsplit(".", 1)[-1]

    @property
    def seed(self) -> Any:
        return self.config.get("seed_everything")

    @property
    def loss(self) -> float:
        return self.metrics["val/loss"]

    @property
    def leaking(self) -> bool:
        return bool(self.metrics.get("leaking") or self.record.get("leaking"))

    @property
    def blind(self) -> str:
        """What the last blind pass found; nothing for a run without one."""
        return (self.record.get("blind") or {}).get("said", "")

    @property
    def unaudited(self) -> bool:
        return self.record.get("audit") is None

    @property
    def continued(self) -> dict[str, dict[str, Any]]:
        """Step -> the config, precision and code hashes with which the run continued from there."""
        return self.record.get("continued", {})

    @property
    def code(self) -> set[str]:
        """Shortened hashes of llmx's sources, of the beginning and of every continuation."""
        return {part.get("code", "unknown")[:8] for part in (self.record, *self.continued.values())}

    @property
    def seconds(self) -> float | None:
        """Wall-clock of the fit; None for a continued run, which knows only the seconds of its last part."""
        return self.metrics["seconds"] if self.metrics.get("steps_in_these_seconds") == self.metrics["step"] else None

    @property
    def seconds_per_step(self) -> float | None:
        steps = self.metrics.get("steps_in_these_seconds")
        return self.metrics["seconds"] / steps if steps else None

    @cached_property
    def losses(self) -> np.ndarray:
        """(N,) nats of each predicted character of the validation split, float64."""
        path = self.folder / VAL_LOSSES
        try:
            return np.load(path, allow_pickle=False).astype(np.float64)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {one_line(error, 200)}") from error

    @cached_property
    def curves(self) -> dict[str, Curve]:
        return read_curves(self.folder)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the run, without validation."""
        curve = self.curves.get("train/tokens_per_second")
        return float(np.median([value for _, value in curve])) if curve else None

    @property
    def training_flops(self) -> float | None:
        per_token, tokens = self.record["network"]["training_flops_per_token"], self.metrics["tokens"]
        return None if per_token is None or tokens is None else per_token * tokens


def read_run(folder: str | Path) -> Run:
    """A run that has ended or not. Raises UserError if the folder is no run, or a file is damaged."""
    folder = Path(folder)
    for name in (RECORD, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: is no run: it has no {name}")
    metrics = _read_json(folder / METRICS) if (folder / METRICS).is_file() else {}
    return Run(folder, read_yaml(folder / CONFIG), _read_record(folder), metrics)


def read_finished_run(folder: str | Path) -> Run:
    """A run that has ended, with all keys and losses that `compare` needs.

    Raises UserError if the folder is no run, the run has not ended, an earlier version kept too little, or the files
    contradict each other.
    """
    run = read_run(folder)
    folder = run.folder
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: is no finished run: it has no {METRICS} (it has not ended)")
    for name, content in ((RECORD, run.record), (METRICS, run.metrics), (CONFIG, run.config)):
        for key, kind in (REQUIRED[name] | OPTIONAL[name]).items():
            try:
                fits = all(isinstance(value, kind) for value in _values_at(content, key.split(".")))
            except LookupError:
                fits = key in OPTIONAL[name]
            except (TypeError, AttributeError):
                fits = False
            if not fits:
                raise UserError(
                    f"{folder / name}: {key} is missing or damaged: the run was never validated, or is of an older "
                    "version: run its fit again"
                )
    if not (folder / VAL_LOSSES).is_file():
        raise UserError(f"{folder}: has no {VAL_LOSSES}, the losses of its validation split: run its fit again")
    if not math.isfinite(run.loss):
        raise UserError(f"{folder / METRICS}: val/loss is {run.loss}: there is nothing to compare")
    if not abs(run.losses.mean() - run.loss) <= AGREE:  # NaN too
        raise UserError(
            f"{folder}: val/loss of {METRICS} is {run.loss:.4f}, and {VAL_LOSSES} is of a validation with "
            f"{run.losses.mean():.4f}: the run continued and has not ended; fit --ckpt_path {last_checkpoint(folder)} "
            "ends it"
        )
    return run


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}") from None


def _read_record(folder: Path) -> dict[str, Any]:
    record = _read_json(folder / RECORD)
    try:
        whole = isinstance(record.get("data", {}), dict) and all(
            step.isdigit() and isinstance(part, dict) for step, part in record.get("continued", {}).items()
        )
    except AttributeError:
        whole = False
    if not whole:
        raise UserError(f"{folder / RECORD}: is damaged: it does not tell what the run began with")
    return record


def _values_at(content: Any, keys: Sequence[str]) -> Iterator[Any]:
    """The values at a path of keys; `*` stands for every key. Raises LookupError or TypeError if there is none."""
    if not keys:
        yield content
    elif keys[0] == "*":
        for inner in content.values():
            yield from _values_at(inner, keys[1:])
    else:
        yield from _values_at(content[keys[0]], keys[1:])


def read_events(folder: str | Path) -> dict[str, list[Any]]:
    """All scalars by tag, as TensorBoard's events with step, value and wall_time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})  # 0: all of them
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """All scalars by tag."""
    return {tag: [(event.step, event.value) for event in events] for tag, events in read_events(folder).items()}


def begin_run(folder: Path, config: str, record: dict[str, Any]) -> None:
    """Writes the configuration (YAML) and the record of a new run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).unlink(missing_ok=True)
    (folder / CONFIG).write_text(config)
    write_json(folder / RECORD, record)


def continue_run(folder: Path, config: str, record: dict[str, Any], step: int) -> None:
    """Notes in the record from which step, and with which other settings, a run continues. Deletes its final numbers
    unless that step is its last.

    Takes what `begin_run` would get, and the optimizer steps done. Notes nothing in a folder without record or
    configuration. Raises UserError for other data than the run began with.
    """
    check_same_data(folder, record["data"])
    if step < record["steps"]:
        (folder / METRICS).unlink(missing_ok=True)
    if not (folder / RECORD).is_file() or not (folder / CONFIG).is_file():
        return
    held = _read_record(folder)
    now = {**{key: record[key] for key in ("precision", "code", "sources")}, "config": _settings(config)}
    continued = {at: part for at, part in held.get("continued", {}).items() if int(at) < step}
    began = {"config": _settings((folder / CONFIG).read_text()), **held}
    before = list(continued.values())[-1] if continued else {key: began[key] for key in now.keys() & began.keys()}
    if now != now | before:
        continued[str(step)] = now
    held["continued"] = continued
    if record["audit"] is not None:
        held["audit"] = held.get("audit") or record["audit"]
    elif now["sources"] != before.get("sources", now["sources"]):
        held["audit"] = None  # it audited other code
    held["leaking"] = held.get("leaking", False) or record["leaking"]
    write_json(folder / RECORD, held)


def note_blind(folder: Path, result: dict[str, Any], leaking: bool) -> None:
    """Keeps the result of the last blind pass in the record."""
    held = _read_record(folder)
    write_json(folder / RECORD, held | {"blind": result, "leaking": held.get("leaking", False) or leaking})


def end_run(folder: Path, metrics: dict[str, Any]) -> None:
    write_json(folder / METRICS, metrics)


def write_losses(folder: Path, losses: np.ndarray) -> None:
    """losses (N,): nats of each predicted character of the validation split, in order."""
    np.save(folder / VAL_LOSSES, losses)


def write_predictions(run: Path, records: list[dict[str, Any]], sampling: dict[str, Any]) -> Path:
    """Writes `predictions/N.jsonl`, a line for each record with the sampling's settings, and `N.txt`; N is the first
    free number. Returns the path of the JSON Lines."""
    folder = run / PREDICTIONS
    folder.mkdir(exist_ok=True)
    path = next(path for n in count() if not (path := folder / f"{n}.jsonl").exists())
    lines = [json.dumps({**record, "sampling": sampling}, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rule = "\n" + "-" * 80 + "\n"
    path.with_suffix(".txt").write_text(rule.join(record["text"] for record in records) + "\n", encoding="utf-8")
    return path


def check_same_data(folder: Path, data: dict[str, Any]) -> None:
    """Raises UserError if a run in this folder began with another text, split, batch or evaluation."""
    if not (folder / RECORD).is_file():
        return
    held = _read_record(folder).get("data", {})
    now = json.loads(json.dumps(data))
    for key in now:
        if key in ("corpus", "requested") or held.get(key, now[key]) == now[key]:  # the text may lie elsewhere
            continue
        began, continues = held[key], now[key]
        if key in ("sha256", "characters"):
            began, continues = (f"{of.get('corpus')} (sha256 {str(of.get('sha256'))[:12]})" for of in (held, now))
        name = {"sha256": "corpus", "characters": "corpus", "vocab_size": "tokenizer"}.get(key, key)
        raise UserError(
            f"data.{name}: {folder} began with {began} and cannot continue with {continues}; begin a new run, and "
            "give it the weights of this one by --model.warm_start"
        )


def _settings(config: str) -> dict[str, Any]:
    return {key: value for key, value in parse_yaml(config, CONFIG).items() if key != "ckpt_path"}
