"""Generated text in the run's folder: JSON Lines for programs, plain text for people."""

import json
from itertools import count
from pathlib import Path
from typing import Any

from llmx.runs.folder import PREDICTIONS


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
