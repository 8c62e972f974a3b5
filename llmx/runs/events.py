"""The curves of a run, read from its TensorBoard events."""

from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]  # (step, value)


def read_events(folder: str | Path) -> dict[str, list[Any]]:
    """All scalars by tag, as TensorBoard's events with step, value and wall_time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})  # 0: all of them
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """All scalars by tag."""
    return {tag: [(event.step, event.value) for event in events] for tag, events in read_events(folder).items()}
