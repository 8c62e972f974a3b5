"""What torch and the system say when a run cannot go on, as one message."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from llmx.errors import UserError

TORN = ("gloo", "nccl", "pair closure")  # one of them is in what torch raises where another process is lost
TOO_LARGE = re.compile("can't allocate memory|Storage size calculation overflowed")  # torch, of a CPU


def too_large(error: Exception) -> str | None:
    """What to say where memory was refused; None for any other error."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not TOO_LARGE.search(str(error)):
        return None
    return (
        f"out of memory: {' '.join(str(error).split())[:200]}. data.batch_size, data.window, model.network or "
        "model.sampling.max_new_tokens asks for more than there is"
    )


def lost(error: Exception) -> str | None:
    """What to say where another process of a run failed; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, ProcessException):  # of processes that were forked off
        text = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
        known = isinstance(error, ProcessExitedException) or text != str(error).strip()
        return f"trainer: process {error.error_index} failed: {text}" if known else None
    torn = dist.is_initialized() and any(name in text.lower() for name in TORN)
    if not torn and not isinstance(error, dist.DistError):
        return None
    return (
        "trainer: another process of this run is gone or does not answer; fit --ckpt_path last goes on from the last "
        f"checkpoint ({text[:200]})"
    )
