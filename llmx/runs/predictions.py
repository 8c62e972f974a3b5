"""Generated text in the run's folder: JSON Lines for programs, plain text for people."""

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from llmx.generation import Sampling


def write_predictions(run: Path, records: list[dict[str, Any]], sampling: Sampling) -> Path:
    """Writes `predictions/N.jsonl` (a record a line, the sampling with each) and `N.txt`; N is the first free number.

    Returns the path of the JSON Lines.
    """
    folder = run / "predictions"
    folder.mkdir(exist_ok=True)
    number = next(n for n in count() if not (folder / f"{n}.jsonl").exists())
    lines = [json.dumps({**record, "sampling": asdict(sampling)}, ensure_ascii=False) for record in records]
    path = folder / f"{number}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rule = "\n" + "-" * 80 + "\n"
    path.with_suffix(".txt").write_text(rule.join(record["text"] for record in records) + "\n", encoding="utf-8")
    return path
