"""How the audits tell rounding from a leak: by relative change, casts to a lower precision and Fourier transforms."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-9  # relative to the largest output; a convolution by FFT reaches 4e-16
# for a network that casts down inside
CAST_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}
SAME_SHAPE_TOLERANCE = 1e-6  # equal shapes round alike even after such a cast, but not in FFTs
MIN_LOG_PROBABILITY = -100.0  # nats; lower values count as equal


def relative_change(first: Tensor, second: Tensor) -> Tensor:
    """Elementwise difference, relative to the largest number of `first`; inf where only one of the two is finite."""
    difference = torch.where(first == second, 0, (first - second).abs().nan_to_num(nan=math.inf))
    scale = first.abs().nan_to_num(0, 0, 0).max()
    return difference / torch.where(scale > 0, scale, 1)


class RoundingWatch(TorchFunctionMode):
    """Sets `tolerance` by the casts from float64 to a lower precision, and `transforms` at a Fourier transform.

    The rounding of a cast is no leak. In a Fourier transform the rounding of each number depends on all others.
    """

    tolerance = TOLERANCE
    transforms = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        self.transforms |= "fft" in name
        target = args[0] if name in ("__setitem__", "copy_") else output
        exact = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
        if exact and isinstance(target, Tensor) and not (name.startswith("new_") or name.endswith("_like")):
            self.tolerance = max(self.tolerance, CAST_TOLERANCE.get(target.dtype, 0))
        return output
