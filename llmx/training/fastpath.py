"""What is fastest on this machine: the choices a plain `fit` makes where no flag makes them."""

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
