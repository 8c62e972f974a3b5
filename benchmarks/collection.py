"""Runs every config of the collection unchanged and keeps a row for each: loss, time, parameters, state.

python -m benchmarks.collection                    # all configs without a row, one after the other
python -m benchmarks.collection llama gpt2         # these again

A row goes to docs/results/collection.json, and as a comment into the config's header. Each config runs once, with one
seed. The rows say what to expect, not which architecture is better.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmx import LanguageModel
from llmx.config.base_files import read_config
from llmx.parts.parameter_count import count_bytes

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ROWS = ROOT / "docs" / "results" / "collection.json"
LENGTHS = (32, 4096)  # tokens after which the state is measured


def collection() -> list[str]:
    """The configs with the shared protocol."""
    shared = read_config(CONFIGS / "base.yaml")["data"]
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in ("base", "transformer"))
    return [name for name in names if read_config(CONFIGS / f"{name}.yaml").get("data") == shared]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Runs a config in a folder and returns its row."""
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(CONFIGS / f"{name}.yaml")]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder)]
    subprocess.run([*command, *quiet], check=True, cwd=ROOT)
    run = folder / "lightning_logs" / "version_0"
    metrics, record = (json.loads((run / file).read_text()) for file in ("metrics.json", "run.json"))
    model = LanguageModel.load_from_checkpoint(run / "checkpoints" / "last.ckpt", map_location="cpu")
    stateful = model.network.stateful
    return {
        "loss": round(metrics["val/loss"], 4),
        "steps": metrics["step"],
        "seconds": round(metrics["seconds"]),
        "parameters": record["parameters"],
        "state_bytes": {str(n): state_bytes(model, n) for n in LENGTHS} if stateful else None,
        "leaking": record["leaking"],
        "corpus": record["data"]["corpus"],
        "precision": record["precision"],
        "processor": record["hardware"]["processor"],
        "threads": record["hardware"]["threads"],
        "commit": record["commit"],
    }


def state_bytes(model: LanguageModel, length: int) -> int | None:
    """None if the network takes fewer tokens."""
    try:
        return count_bytes(model.network.init_state(1, length))
    except ValueError:
        return None


def header(row: dict[str, Any]) -> str:
    """The comment in a config about its run."""
    steps = f"{row['steps']:,} steps" if row["steps"] > 1 else "Counted once"
    loss = f"validation loss {row['loss']:.3f}{' (LEAKING: it means nothing)' if row['leaking'] else ''}"
    threads = "one thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"# {steps}: {loss} after {row['seconds']} s on {threads} of an {row['processor']}, {row['precision']}."


def stamp(name: str, row: dict[str, Any]) -> None:
    """Writes the comment under the command in the config's header and replaces an older one."""
    path = CONFIGS / f"{name}.yaml"
    command = f"#   python main.py fit --config configs/{name}.yaml\n"
    older = r"(?:# (?:[\d,]+ steps|Counted once): validation loss .*\n)?"
    text = re.sub(re.escape(command) + older, lambda _: f"{command}{header(row)}\n", path.read_text(), count=1)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="configs (default: all without a row)")
    names = parser.parse_args().names
    for name in names or [name for name in collection() if name not in read_rows()]:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Path(folder))
        rows = {**read_rows(), name: row}  # read again: another process may have added a row
        ROWS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        stamp(name, row)
        print(f"{name}: {header(row)}", flush=True)


def read_rows() -> dict[str, Any]:
    return json.loads(ROWS.read_text()) if ROWS.is_file() else {}


if __name__ == "__main__":
    main()
