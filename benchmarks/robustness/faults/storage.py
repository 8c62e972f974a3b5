"""Faults of the disk: full, full for checkpoints only, read-only."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.robustness.faults.laboratory import FaultLaboratory, Skipped, damage, failure, wrong_refusal


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], Any]]:
    """Mounts a disk of `size` bytes at a folder and yields a function that remounts it with other options.

    Raises Skipped if this user may not mount a disk.
    """
    folder.mkdir()
    options = f"size={size},mode=777"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no small disk can be mounted: {done.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk_full(lab: FaultLaboratory, random: Random) -> str:
    """The disk of the runs fills up: one message. Once there is room, the run resumes."""
    needed = sum(path.stat().st_size for path in (lab.references / "plain").rglob("*") if path.is_file())
    with small_disk(lab.run.parent, int(random.uniform(0.05, 0.9) * needed) + 4096) as remount:
        (process,) = lab.fit("plain")
        code = process.wait()
        remount("size=100m")
        if code == 0:  # older files were deleted in time
            return lab.loss_against_reference("plain")
        lost = wrong_refusal([process]) or (damage(lab.last) if lab.last.exists() else "")
        return lost or lab.loss_after_resuming("plain")


def checkpoints_do_not_fit(lab: FaultLaboratory, random: Random) -> str:
    """The disk is full for checkpoints. A limit on the size of a file does the same where no disk can be mounted."""
    size = (lab.references / "plain/checkpoints/last.ckpt").stat().st_size
    limit = random.randrange(size // 2, size)

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    if lost := wrong_refusal(lab.fit("plain", before=before), "could not be written"):
        return lost
    if left := [*lab.run.glob("checkpoints/*partial*")]:
        return f"left behind: {left}"
    return lab.loss_after_resuming("plain")


def read_only(lab: FaultLaboratory, random: Random) -> str:
    """With read-only data and cache the run is the same. With a read-only run folder there is one message."""
    disk = lab.folder / "disk"
    with small_disk(disk, 2**20) as remount:
        shutil.copy(lab.folder / "corpus.txt", disk)
        remount("ro")
        environment = {"LLMX_CACHE": str(disk / "cache")}
        data = ("--data.root", "disk", "--data.corpus", "disk/corpus.txt")
        lost = failure(lab.fit("plain", *data, environment=environment)) or lab.loss_against_reference("plain")
        return lost or wrong_refusal(lab.fit("plain", "--trainer.default_root_dir", "disk"), "disk")
