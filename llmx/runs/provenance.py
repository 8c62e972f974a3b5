"""Where a run comes from: commit, versions, hardware, hashes of sources."""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import llmx

_PACKAGES = ("torch", "lightning", "torchmetrics", "jsonargparse", "tensorboard", "numpy")
_VERSIONED = ("llmx", "torch", "lightning", "torchmetrics")


def provenance() -> dict[str, Any]:
    """Commit of llmx's checkout (`dirty` if files changed since), versions and hardware, as plain data."""
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


def sources(classes: Iterable[type]) -> dict[str, str]:
    """Module -> hash of its file, for the modules of classes, their base classes and all that these modules import.
    Leaves out modules that a version identifies: llmx, torch, lightning and imports from installed packages."""
    waiting = {base.__module__ for cls in classes for base in cls.__mro__}
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name in found or name.split(".")[0] in {*_VERSIONED, *sys.stdlib_module_names} or file is None:
            continue
        found[name] = file_hash(file)
        for value in vars(sys.modules[name]).values():
            imported = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if not isinstance(imported, str):
                continue
            theirs = _file(imported)
            if theirs is not None and {"site-packages", "dist-packages"}.isdisjoint(theirs.parts):
                waiting.add(imported)
    return dict(sorted(found.items()))


def code() -> str:
    """Hash of all sources of llmx."""
    package = Path(llmx.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {file_hash(path)} ".encode())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file is not None and Path(file).is_file() else None


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
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
