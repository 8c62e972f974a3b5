"""Where a run comes from: commit, versions, hardware."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import llmx

_PACKAGES = ("torch", "lightning", "torchmetrics", "jsonargparse", "tensorboard", "numpy")


def provenance() -> dict[str, Any]:
    """Plain data: commit of the checkout that llmx runs from, with `dirty` where it has changes, versions, hardware."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": ["python", *sys.orig_argv[1:]],
        "versions": {"llmx": llmx.__version__, "python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "hardware": {
            "platform": platform.platform(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _git(*arguments: str) -> str | None:
    checkout = Path(llmx.__file__).parent.parent
    try:
        result = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
