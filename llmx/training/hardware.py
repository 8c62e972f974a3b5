"""What this machine does fast: its precision, the memory that its C library keeps, compilation and when that pays."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from llmx.generation import Decode, decode

COMPILE_FROM = 2000  # steps: about where a faster step has paid for half a minute of compiling
COMPILE_DECODING_FROM = 10_000  # tokens in turn: compiling pays from 4,000 on if it was done before, or 23,000
FEW_ROWS = 4  # up to so many, a matrix product is written out when decoding compiles
WORTH_A_THREAD = 2**16  # numbers that a thread processes while another one wakes up, when decoding


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


def can_compile() -> bool:
    """Whether Inductor finds a compiler: a C++ compiler for the CPU."""
    if torch.cuda.is_available():
        return True
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def compiled_decode() -> Decode:
    """`decode`, compiled.

    On a CPU matrix products of a few rows are written out as sums. Inductor then makes one C++ function of the whole
    step. A library call for each product would cost more than its arithmetic.
    """
    return torch.compile(decode, dynamic=False, backend="inductor" if torch.cuda.is_available() else _few_rows)


def _few_rows(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
    """Inductor, with the products of few rows written out."""
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    patches = {
        "size_asserts": False,  # the inputs are always the network's own weights and state; a tenth of a step
        "cpp.min_chunk_size": WORTH_A_THREAD,
    }
    # here and not in Inductor's own table of decompositions, with which it caches nothing for the next process
    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.mm.default: _mm, torch.ops.aten.addmm.default: _addmm}
    inference = any(isinstance(x, torch.Tensor) and x.is_inference() for x in inputs)  # as in `predict`
    with torch.inference_mode() if inference else nullcontext():  # inference_mode(False) would turn gradients on
        written_out = make_fx(graph, table)(*inputs)
    values = [node.meta.get("val") for node in written_out.graph.nodes]
    if not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values):
        # C++ allocates the buffers too, which takes Python as long as the loops; it has no calls for complex numbers
        patches |= {"cpp_wrapper": True, "memory_planning": True}
    for node in written_out.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)  # inference tensors, with which the C++ wrapper would be traced
    return compile_fx(written_out, list(inputs), config_patches=patches)


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.shape[0] > FEW_ROWS:
        return NotImplemented
    left = left.contiguous()
    # a strided input is computed once, and not again in the sum of each output; lower Inductor thresholds, which do
    # the same, miscompiled Hyena
    left = left.as_strided(left.shape, left.stride())
    return (left[:, None] * right.t()).sum(-1)


def _addmm(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if left.shape[0] > FEW_ROWS or beta != 1 or alpha != 1:
        return NotImplemented
    return bias + _mm(left, right)
