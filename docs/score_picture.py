"""docs/images/score.png: one row of a batch in the first pass and in the blind pass.

python -m docs.score_picture          draws it
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PICTURE = Path(__file__).parent / "images" / "score.png"
ROW = "To be, or not to be, that is"
OTHER = "eh tsnoa,l e.tRydo mefi uoht"
NEIGHBOURS = ("Whether 'tis nobler in the m", "He hath no children. All my ")
CUT = 16  # the drawn character is the first of the other text
SAME, NEW, GREY, DRAWN = "#cfe3f5", "#f6d3cd", "#ececec", "#c0392b"


def draw() -> Figure:
    figure = Figure(figsize=(11, 4.3), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    passes = (
        (5.2, "first pass", ROW, NEIGHBOURS[0]),
        (1.4, "blind pass", ROW[:CUT] + OTHER[CUT:], NEIGHBOURS[1]),
    )
    for top, name, text, neighbour in passes:
        for column, letter in enumerate(text):
            color = NEW if name == "blind pass" and column >= CUT else SAME
            axes.add_patch(_cell(column, top, color))
            axes.text(column + 0.5, top + 0.5, letter, ha="center", va="center", family="monospace", fontsize=13)
        for column, letter in enumerate(neighbour):
            axes.add_patch(_cell(column, top - 1.1, GREY))
            place = (column + 0.5, top - 0.6)
            axes.text(*place, letter, ha="center", va="center", family="monospace", fontsize=11, color="#888888")
        axes.text(-0.4, top + 0.5, name, ha="right", va="center", fontsize=12, weight="bold")
        axes.text(-0.4, top - 0.6, "another row", ha="right", va="center", fontsize=10, color="#888888")
    axes.annotate(
        "", (CUT - 0.5, 2.5), (CUT - 0.5, 5.1), arrowprops={"arrowstyle": "<->", "color": DRAWN, "linewidth": 1.8}
    )
    axes.text(CUT - 0.1, 3.15, "the loss of the drawn character:\nthe gain is the difference", color=DRAWN, fontsize=11)
    axes.text(CUT - 1.1, 3.15, "losses up to here\nare the same to the last bit", ha="right", fontsize=11)
    axes.text(CUT, -0.2, "other text from the drawn character on", fontsize=10, va="top", color=DRAWN)
    axes.text(0, -0.2, "the same text", fontsize=10, va="top", color="#2b6ca3")
    axes.set_xlim(-4.2, len(ROW) + 0.2)
    axes.set_ylim(-1, 6.4)
    axes.set_axis_off()
    return figure


def _cell(column: int, top: float, color: str) -> Rectangle:

    return Rectangle((column, top), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5)


if __name__ == "__main__":
    draw().savefig(PICTURE)
