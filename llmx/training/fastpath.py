"""What is fastest on this machine: the choices a plain `fit` makes where no flag makes them."""

import ctypes
import os
import shutil
import sys

import torch

COMPILE_FROM = 2000  # steps: about where a faster step has paid for half a minute of compiling
COMPILE_DECODING_FROM = 10_000  # tokens one after the other: about where a faster step has paid for 15 seconds


def native_bf16(accelerator: str) -> bool:
    """Whether the device that Lightning will take multiplies bfloat16 in hardware."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def fast_precision(accelerator: str) -> str:
    """The precision that Lightning is told where nothing else decides."""
    return "bf16-mixed" if native_bf16(accelerator) else "32-true"


def can_compile() -> bool:
    """Whether Inductor finds what it compiles with: a C++ compiler for the CPU."""
    if torch.cuda.is_available():
        return True
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def keep_freed_memory() -> None:
    """Lets the C library keep what a training step frees for the next step, where it is glibc.

    By itself it returns the activations to the system after every step, and the next one waits for every page to be
    mapped and cleared again: a fifth of the step at the founding dimensions.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most there is
