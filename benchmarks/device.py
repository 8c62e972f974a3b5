"""Where the benchmarks compute, and the clock that waits for it."""

import time

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds, after all that was launched has ended."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
