"""docs/architectures.md: a page for the whole collection, made of what the code and the configs say of themselves.

python -m docs.generate          writes it
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from llmx.config.factories import components_by_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
BASELINE = "llama"  # what its components say stands there, and is not repeated for those that share them
INTRODUCTION = """# The collection

Made by `python -m docs.generate` from the configs, the modules they are built of, and the measured rows in
[results/collection.json](results/collection.json); edit those.

Every config shares corpus, window (32 characters), batch and the once-only validation
([base.yaml](../configs/base.yaml)) and, where its header does not say otherwise, 1,000 steps, optimizer and schedule
(but [record](#record) and [fast](#fast), out for a low loss and a short time). The losses are one run each, one seed:
they say what to expect, not which architecture is better. State is what one sequence keeps while generating, in bytes.
"""


def render() -> str:
    """The page as Markdown."""
    rows = json.loads((ROOT / "docs" / "results" / "collection.json").read_text())
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "base")
    entries = [Entry(name, rows.get(name)) for name in names]
    shared = set(next(entry for entry in entries if entry.name == BASELINE).modules)
    headings = ("architecture", "paper", "time", "state at 32", "at 4,096 tokens", "parameters", "loss")
    index = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *(entry.index_row() for entry in entries)]
    sections = [entry.section(set() if entry.name == BASELINE else shared) for entry in entries]
    return "\n".join([INTRODUCTION, *index, "", *sections])


class Entry:
    """One config: its header, its network, the modules of its components, its measured row."""

    def __init__(self, name: str, row: dict[str, Any] | None):
        self.name = name
        self.row = row
        self.text = (ROOT / "configs" / f"{name}.yaml").read_text()
        self.network = yaml.safe_load(self.text)["model"]["network"]
        self.header = [line[2:] for line in self.text.splitlines() if line.startswith("# ")]
        known = components_by_name()
        used = [known[word] for word in _words(self.network) if word in known]
        self.modules = list(dict.fromkeys(cls.__module__ for cls in used))

    def index_row(self) -> str:
        papers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", " ".join(self.header)))
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
        mixing = [module for module in self.modules if module.startswith(("llmx.mixers.", "llmx.networks."))]
        time = " + ".join(dict.fromkeys(cost for module in mixing if (cost := _time(_docstring(module)))))
        state, parameters, loss = ["", ""], "", ""
        if self.row:
            sizes = self.row["state_bytes"]
            told = [f"{size:,}" if size else "too long" for size in sizes.values()] if sizes else []
            state = told or ["recomputes"] * 2
            parameters = f"{self.row['parameters']:,}"
            loss = "LEAKING" if self.row["leaking"] else f"{self.row['loss']:.3f}"
        cells = (f"[{self.name}](#{self.name})", links, time, *state, parameters, loss)
        return f"| {' | '.join(cells)} |"

    def section(self, told_elsewhere: set[str]) -> str:
        command = f"python main.py fit --config configs/{self.name}.yaml"
        said = [line.strip() for line in self.header if line.strip() != command]
        network = yaml.safe_dump(self.network, sort_keys=False, default_flow_style=None, width=100).rstrip()
        parts = [f"## {self.name}", " ".join(said), f"```bash\n{command}\n```", f"```yaml\n{network}\n```"]
        for module in [module for module in self.modules if module not in told_elsewhere]:
            place = f"{module.replace('.', '/')}.py"
            parts.append(f"[{place}](../{place})\n```text\n{_docstring(module)}\n```")
        return "\n\n".join(parts) + "\n"


def _words(value: Any) -> list[str]:
    """Every string in nested data, in order."""
    if isinstance(value, dict):
        return [word for item in value.values() for word in _words(item)]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [value] if isinstance(value, str) else []


def _docstring(module: str) -> str:
    return inspect.getdoc(sys.modules[module]) or ""


def _time(text: str) -> str:
    """The first cost in time that a docstring states, such as O(T^2 D)."""
    found = re.search(r"\b[Tt]ime\b[^.]*?(O\((?:[^()]|\([^)]*\))*\))", text)
    return f"`{found.group(1)}`" if found else ""


def main() -> None:
    PAGE.write_text(render())
    print(PAGE)


if __name__ == "__main__":
    main()
