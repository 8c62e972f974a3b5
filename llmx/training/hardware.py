"""What this machine does fast: which precision it multiplies in hardware, and how its C library keeps memory."""

import ctypes
import sys

import torch


def native_bf16(accelerator: str) -> bool:
    """Whether the device that Lightning will take multiplies bfloat16 in hardware."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def fast_precision(accelerator: str) -> str:
    """The precision that a run takes if neither a flag nor its checkpoint decides."""
    return "bf16-mixed" if native_bf16(accelerator) else "32-true"


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that a training step frees for the next step; does nothing without glibc.

    By itself glibc returns the activations to the system after every step. The next step then waits for every page to
    be mapped and cleared again, which takes a fifth of a step at the founding dimensions.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the highest value there is
