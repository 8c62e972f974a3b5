"""The peak memory of a process. Imports no torch, whose own memory would count."""

import sys
from pathlib import Path


def peak_bytes() -> int | None:
    """The most memory that this process held at once; None on Windows."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # a child's getrusage begins with the memory of its parent, VmHWM does not
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if "VmHWM" in status:
            return 1024 * int(status["VmHWM"].split()[0])  # kilobytes
    import resource

    return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_bytes_of_children() -> int:
    """The most memory that the largest ended child process held at once."""
    import resource

    return _bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _bytes(resident: int) -> int:
    return resident if sys.platform == "darwin" else 1024 * resident  # other systems count in kilobytes
