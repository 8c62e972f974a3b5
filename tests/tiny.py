"""What the tests of the command line run: a corpus and a network that take a second, and where the run is."""

from pathlib import Path
from typing import Any

TEXT = "".join(f"{i * i % 97:02d} the quick brown fox, {i % 13} lazy dogs;\n" for i in range(120))  # 4 kB


def network(depth: int) -> dict[str, Any]:
    """A Llama of dim 8, as a config has it."""
    mixer = {"class_path": "Attention", "init_args": {"heads": 2}}
    feed_forward = {"class_path": "SwiGLU", "init_args": {"hidden": 8}}
    block = {"class_path": "PreNormBlock", "init_args": {"mixer": mixer, "feed_forward": feed_forward}}
    return {"class_path": "Decoder", "init_args": {"dim": 8, "depth": depth, "block": block}}


def newest_run() -> Path:
    """The last run below the working directory."""
    return max(Path("lightning_logs").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
