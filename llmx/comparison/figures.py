"""The figures of a comparison; two of them split a loss by the place in the window and the kind of character."""

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llmx.comparison.groups import Group, mark
from llmx.comparison.ranking import Comparison, Row
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.runs.record import Run

LOSS = "validation loss, nats per character"
KINDS = ("speaker's name", "start of a word", "inside a word", "space", "new line", "punctuation")


def figures(comparison: Comparison, groups: Sequence[Group]) -> dict[str, Figure]:
    """The figures by name, without those that have nothing to draw."""
    names = [row.name for row in comparison.rows]
    ordered = sorted(groups, key=lambda group: names.index(group.name))
    drawn = {
        "loss": loss_figure(comparison),
        "curves": curves_figure(ordered),
        "position": position_figure(ordered),
        "kind": kind_figure(ordered),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def loss_figure(comparison: Comparison) -> Figure:
    """The losses with their intervals, best at the top."""
    rows = comparison.rows
    labels = [_label(row) for row in rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(8, 1.5 + 0.14 * len(rows) + 0.2 * lines), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        color = "tab:red" if mark(row) else "tab:blue" if row.loss.basis == "seeds" else "tab:gray"
        if row.loss.known:
            axes.plot([row.loss.low, row.loss.high], [place, place], color=color, linewidth=2)
        axes.plot(row.loss.value, place, "o", color=color)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set(xlabel=f"{LOSS}\n95 %: blue over seeds, gray over the text;\nred: LEAKING or UNAUDITED")
    axes.grid(axis="x", alpha=0.3)
    return figure


def curves_figure(groups: Sequence[Group]) -> Figure:
    """Validation loss against steps, training FLOPs and wall-clock, a thin line for each run."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels: list[tuple[str, Callable[[Run], float | None]]] = [
        ("step", lambda run: 1.0),
        ("training FLOPs", lambda run: run.training_flops and run.training_flops / max(1, run.metrics["step"])),
        ("seconds of the fit", lambda run: run.seconds_per_step),
    ]
    for axes, (title, a_step) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for index, group in enumerate(groups):
            for number, run in enumerate(group.runs):
                factor = a_step(run)
                if factor is not None and "val/loss" in run.curves:
                    steps, values = zip(*run.curves["val/loss"], strict=True)
                    axes.plot((np.array(steps) + 1) * factor, values, **_style(group, index, labelled=number == 0))
        axes.set(xlabel=title)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel=LOSS)
    figure.axes[0].legend(fontsize=7)
    return figure


def position_figure(groups: Sequence[Group]) -> Figure | None:
    """Loss against the place in the window: it falls if a network uses its context."""
    alike = [group for group in groups if group.protocol["val_count"] == "new"]
    if not alike:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, group in enumerate(alike):
        place, loss = by_position(group.losses, group.protocol["window"], group.protocol["val_stride"])
        axes.plot(place + 1, loss, **_style(group, index))
    axes.set(xlabel="characters of context", ylabel=LOSS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def kind_figure(groups: Sequence[Group]) -> Figure | None:
    """Loss by the kind of the predicted character; None if the text is gone."""
    data = {group.name: json.dumps(group.runs[0].config["data"]) for group in groups}
    texts = {settings: validation_text(json.loads(settings)) for settings in set(data.values())}
    paired = [(group, texts[data[group.name]]) for group in groups]
    known = [(g, t) for g, t in paired if t is not None and len(t) == len(g.losses) + 1]
    if not known:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(known)
    for index, (group, text) in enumerate(known):
        loss = by_kind(group.losses, text)
        x = np.array([KINDS.index(name) for name in loss]) + (index - (len(known) - 1) / 2) * width
        color, hatch = f"C{index % 10}", "//" * bool(mark(group))
        axes.bar(x, list(loss.values()), width, color=color, label=_label(group), hatch=hatch)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set(ylabel=LOSS)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _style(group: Group, index: int, labelled: bool = True) -> dict[str, Any]:
    style = {"linestyle": "--" if mark(group) else "-", "marker": ".", "color": f"C{index % 10}", "linewidth": 1}
    return style | {"label": _label(group) if labelled else None}


def _label(of: Group | Row) -> str:
    return textwrap.fill(f"{of.name} ({mark(of)})" if mark(of) else of.name, 40)


def positions(count: int, window: int, stride: int | None) -> np.ndarray:
    """(count,): the place in its window, 0 to window - 1, of each prediction. Each character is predicted once: all of
    the first window, then the last `stride` of each following window."""
    stride = window if stride is None else stride
    index = np.arange(count)
    return np.where(index < window, index, window - stride + (index - window) % stride)


def by_position(losses: np.ndarray, window: int, stride: int | None) -> tuple[np.ndarray, np.ndarray]:
    """losses (N,) -> the places that occur, and the mean loss at each."""
    place = positions(len(losses), window, stride)
    count = np.bincount(place, minlength=window)
    total = np.bincount(place, losses, minlength=window)
    occurring = np.flatnonzero(count)
    return occurring, total[occurring] / count[occurring]


@lru_cache(maxsize=4)  # all networks of a comparison share a text
def kinds(text: str) -> np.ndarray:
    """(len(text),): an index into KINDS for each character. A speaker's name is a line that ends with its only colon
    and follows an empty line."""
    letters = np.array([character.isalnum() or character == "'" for character in text], dtype=bool)
    before = np.concatenate(([False], letters[:-1]))
    kind = np.full(len(text), KINDS.index("punctuation"))
    kind[letters & ~before] = KINDS.index("start of a word")
    kind[letters & before] = KINDS.index("inside a word")
    kind[[character == "\n" for character in text]] = KINDS.index("new line")
    kind[[character.isspace() and character != "\n" for character in text]] = KINDS.index("space")
    for name in re.finditer(r"(?:^|(?<=\n\n))[^\n:]+:(?=\n)", text):
        kind[slice(*name.span())] = KINDS.index("speaker's name")
    return kind


def by_kind(losses: np.ndarray, text: str) -> dict[str, float]:
    """losses (N,) of text[1:] -> the mean loss of each kind that occurs."""
    kind = kinds(text)[1:]
    return {name: float(losses[kind == index].mean()) for index, name in enumerate(KINDS) if (kind == index).any()}


def validation_text(data: dict[str, Any]) -> str | None:
    """The validation split of a run's data settings; None if it is gone, or its tokens are not characters."""
    try:
        module = TextDataModule(**data)
        text = module.tokenizer.decode(np.asarray(module.tokens("val")))
        return text if len(text) == len(module.tokens("val")) else None
    except (UserError, OSError):
        return None
