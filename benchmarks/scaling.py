"""How a training step grows: time and peak memory against window and width, at 4,096 tokens a step.

At a constant number of tokens only attention's quadratic part rises with the window. Against the width, the matrix
products are quadratic.

    python -m benchmarks.scaling --out docs/results/speed/scaling.json --plot docs/results/speed/scaling.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.harness import Case, Contender, Result, finish, measure_in_turns, parser, use_threads
from benchmarks.peers import Shape, ours
from benchmarks.train import Mode, prepare_loop
from llmx.training.hardware import fast_precision

TOKENS = 4096  # tokens a step
WINDOWS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DIMS = (64, 128, 256, 512)


def shape(window: int, dim: int) -> Shape:
    hidden = round(8 * dim / 3)
    return Shape(depth=4, dim=dim, heads=8, hidden=hidden, window=window, batch_size=TOKENS // window)


def measure(key: str, shapes: dict[int, Shape], mode: Mode, steps: int, repeats: int) -> list[Result]:
    """Every shape is a contender, so it has its own process and memory."""
    flags = {"precision": mode.precision, "compile": mode.compile, "tokens a step": TOKENS}
    contenders = [
        Contender(f"{key} {size}", partial(prepare_loop, ours, point, mode, steps), flags)
        for size, point in shapes.items()
    ]
    return measure_in_turns(contenders, [Case(f"against {key}")], repeats)


def plot(sweeps: dict[str, list[Result]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, len(sweeps), squeeze=False)
    for column, (key, results) in enumerate(sweeps.items()):
        done = [result for result in results if result.error is None]
        sizes = [int(result.contender.split()[-1]) for result in done]
        seconds = [TOKENS / median(result.values) for result in done]
        gigabytes = [result.peak_bytes / 2**30 for result in done]
        for panel, values, label in zip(panels[:, column], (seconds, gigabytes), ("s a step", "peak GiB"), strict=True):
            panel.plot(sizes, values, marker="o")
            panel.set(xlabel=key, ylabel=label, ylim=(0, None))
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.grid(alpha=0.3)
    panels[0, 0].set_title(f"{TOKENS:,} tokens a step, 4 layers, dim 128")
    panels[0, 1].set_title(f"{TOKENS:,} tokens a step, 4 layers, window 32")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=5, help="training steps a round")
    options.add_argument("--plot", type=Path, help="PNG file")
    chosen = options.parse_args()
    use_threads(chosen.threads)
    mode = Mode(fast_precision("auto"), compile=False)
    sweeps = {
        "window": measure("window", {size: shape(size, 128) for size in WINDOWS}, mode, chosen.steps, chosen.repeats),
        "dim": measure("dim", {size: shape(32, size) for size in DIMS}, mode, chosen.steps, chosen.repeats),
    }
    if chosen.plot is not None:
        plot(sweeps, chosen.plot)
    return finish("scaling of a training step", [result for sweep in sweeps.values() for result in sweep], chosen)


if __name__ == "__main__":
    sys.exit(main())
