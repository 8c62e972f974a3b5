"""The device that the benchmarks compute on, and a clock that waits for it."""

import time

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds, once all kernels that were launched have ended."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
