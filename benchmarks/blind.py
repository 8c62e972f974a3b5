"""Runs every config of the collection for a few steps and keeps what its blind pass over the whole split finds.

python -m benchmarks.blind                    # all configs without a row
python -m benchmarks.blind llama hyena        # these again
python -m benchmarks.blind --compile          # the same compiled; half a minute and more for each

Rows go to docs/results/blind.json, and from there into the table of docs/results/blind.md. The corpus is that of the
configs; pass its folder by LLMX_DATA_PATH.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from llmx import display
from llmx.config.base_files import read_config
from testbed.forked import ForkedProcess

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ROWS = ROOT / "docs" / "results" / "blind.json"
PAGE = ROOT / "docs" / "results" / "blind.md"
STEPS = 20
MOST_SECONDS = 1200
INTRODUCTION = """# The blind pass of every config

Made by `python -m benchmarks.blind` from [blind.json](blind.json). Every config of the collection trains for {steps}
steps. Then its whole validation split is scored twice, as [How the score is made](../score.md) tells. `identical` means
that no loss of a character changed by a single bit. Seconds are those of the second pass, on one thread of a busy
{processor} in {precision}; above 30, other work had taken the processor. The other text of these rows was real text
from elsewhere in the split, not yet characters drawn from it.

"""


def names() -> list[str]:
    """All configs that train a network of the collection."""
    paths = [path for folder in (CONFIGS, CONFIGS / "seed") for path in sorted(folder.glob("*.yaml"))]
    found = [path for path in paths if "network" in (read_config(path).get("model") or {})]
    return [str(path.relative_to(CONFIGS).with_suffix("")) for path in found]


def measure(name: str, compiled: bool) -> dict[str, Any]:
    """Runs a config, and returns what its blind pass found."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--trainer.max_steps", STEPS, "--model.compile", str(compiled).lower()]
        flags += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder]
        process = ForkedProcess(Path(folder), ["fit", "--config", CONFIGS / f"{name}.yaml", *flags])
        code = process.wait(MOST_SECONDS)
        if code != 0:
            raise SystemExit(f"{name} ended with {code}: {process.output[-2000:]}")
        record = json.loads((Path(folder) / "lightning_logs" / "version_0" / "run.json").read_text())
    blind = record["blind"]
    kept = {key: blind[key] for key in ("verdict", "said", "gain", "error", "largest", "characters", "seconds")}
    environment = {"precision": record["precision"], "processor": record["hardware"]["processor"]}
    return kept | environment | {"corpus": record["data"]["corpus"], "commit": record["commit"]}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown."""
    forms = [form for form in ("eager", "compiled") if any(form in row for row in rows.values())]
    some = next(row for of in rows.values() for row in of.values())
    headings = ["config", *(heading for form in forms for heading in (form, "seconds"))]
    lines = [f"| {' | '.join(headings)} |\n", f"|{'---|' * len(headings)}\n"]
    for name in filter(rows.__contains__, names()):
        cells = [f"[{name}](../../configs/{name}.yaml)"]
        for form in forms:
            row = rows[name].get(form)
            cells += ["-", "-"] if row is None else [row["said"], display.seconds(row["seconds"])]
        lines.append(f"| {' | '.join(cells)} |\n")
    return INTRODUCTION.format(steps=STEPS, **{key: some[key] for key in ("precision", "processor")}) + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    form = "compiled" if arguments.compile else "eager"
    rows: dict[str, dict[str, Any]] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for name in arguments.configs or [name for name in names() if form not in rows.get(name, {})]:
        row = measure(name, arguments.compile)
        rows.setdefault(name, {})[form] = row
        print(f"{name}, {form}: {row['said']}, {display.seconds(row['seconds'])}", flush=True)
        ROWS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
