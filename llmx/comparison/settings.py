"""Which settings of two runs must be equal, and how they differ."""

from collections.abc import Iterable, Iterator
from typing import Any

from llmx.runs.record import PROTOCOL, Run

SEEN = "tokens seen"
# settings that change where and how fast a run goes, but not its result
IGNORED = {"seed_everything", "ckpt_path", "weights_only", "trust"}
IGNORED_OF_TRAINER = {"default_root_dir", "enable_progress_bar", "logger", "log_every_n_steps", "profiler"}
_MONITORS = ("DeviceStatsMonitor", "LearningRateMonitor", "ThroughputMonitor", "ModelCheckpoint")
_DISPLAYS = ("ModelSummary", "RichModelSummary", "RichProgressBar", "TQDMProgressBar")
OBSERVERS = {  # callbacks that change nothing
    *("llmx.training.maps.MixerMaps", "llmx.training.norms.NormsByLayer"),
    *(f"lightning.pytorch.callbacks.{name}" for name in (*_MONITORS, *_DISPLAYS)),
}
LENGTH = 100  # characters of a value that are shown
NOTHING: tuple[Any, ...] = (None, [], {})


def protocol(run: Run) -> dict[str, Any]:
    """What two runs must share for their losses to be ranked. A network that counts has no number of tokens."""
    start = run.config["model"].get("warm_start") or "none"
    if run.record.get("warm_start"):
        start = f"{start} (sha256 {str(run.record['warm_start'].get('sha256'))[:12]})"
    seen = {"warm start": start, SEEN: run.metrics["tokens"], "characters validated": len(run.losses)}
    return {key: run.record["data"][key] for key in PROTOCOL} | seen


def comparable(run: Run) -> dict[str, Any]:
    """The configuration without the seed and all that cannot change the result; with the precision really used, the
    hashes of the sources of classes outside llmx, and the settings that a continuation changed."""
    settings = _comparable(run.config, run.record)
    before = flat(settings) | {"seed_everything": run.seed}
    continued: dict[str, Any] = {}
    for step, part in run.continued.items():
        now = flat(_comparable(part["config"], part)) | {"seed_everything": part["config"].get("seed_everything")}
        changed = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
        continued |= {f"from step {step} {short_key(key)}": now.get(key) for key in changed}
        before = now
    return settings | {"continued": continued}


def _comparable(config: dict[str, Any], used: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in IGNORED}
    trainer = {key: value for key, value in (kept.get("trainer") or {}).items() if key not in IGNORED_OF_TRAINER}
    callbacks = trainer.get("callbacks") or []
    trainer["callbacks"] = [
        callback
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if str(callback.get("class_path") if isinstance(callback, dict) else callback) not in OBSERVERS
    ]
    if "precision" in used:
        trainer["precision"] = used["precision"]
    sources = {f"source of {module}": str(hashed)[:12] for module, hashed in used.get("sources", {}).items()}
    return kept | {"trainer": trainer, "sources": sources}


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by keys such as `model.optimizer.init_args.lr`."""
    result: dict[str, Any] = {}
    for key, value in _items(values):
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict | list) else {f"{prefix}{key}": value}
    return result


def changed(baseline: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Key -> (value in the baseline, value in the other), None for a key that is missing. If the class differs, its
    arguments are not listed: they mean something else."""
    result: dict[str, tuple[Any, Any]] = {}
    here, there = dict(_items(baseline)), dict(_items(other))
    for key in here | there:
        one, two = here.get(key), there.get(key)
        if one == two or (one in NOTHING and two in NOTHING):
            continue
        alike = isinstance(one, list) and isinstance(two, list) and len(one) == len(two)
        if isinstance(one, dict) and isinstance(two, dict):
            alike = one.get("class_path") == two.get("class_path")
        result |= changed(one, two, f"{prefix}{key}.") if alike else {f"{prefix}{key}": (one, two)}
    return result


def short_key(key: str) -> str:
    """`model.network.init_args.dim` -> `network.dim`"""
    return key.replace(".init_args", "").split(".", 1)[-1]


def short_value(value: Any) -> str:
    """A value in a few words; a class by its name and the names of the classes in it."""
    if isinstance(value, dict | list):
        first, *inner = dict.fromkeys(_classes(value)) or [str(value)]
        value = f"{first}({', '.join(inner)})" if inner else first
    text = str(value)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def _items(values: Any) -> Iterable[tuple[Any, Any]]:
    return values.items() if isinstance(values, dict) else enumerate(values)


def _classes(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield str(value["class_path"]).rsplit(".", 1)[-1]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _classes(inner)
