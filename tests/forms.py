"""Helpers for stateful components: `forward`, `step` and `prefill` have to be one function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64: the same sums in another order


def perturbed(module: Any, scale: float = 0.3) -> Any:
    """Moves a module to float64 and its weights away from any initialisation: zero projections hide later layers."""
    torch.manual_seed(1)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            wide = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.add_(torch.randn_like(parameter) * scale * min(1.0, 3 / wide**0.5))
    return module


def pieces(lengths: Sequence[int]) -> list[slice]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def assert_same_outputs_and_gradients(
    module: nn.Module, inputs: Sequence[Tensor], first: Callable[[], Tensor], second: Callable[[], Tensor]
) -> None:
    """Holds two computations equal in outputs and in gradients of the inputs and every parameter."""
    leaves = [*inputs, *module.parameters()]
    names = [f"input {i}" for i in range(len(inputs))] + [name for name, _ in module.named_parameters()]
    results = []
    for run in (first, second):
        output = run()
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
        gradients = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
        results.append((output, gradients))
    assert_close(results[1][0], results[0][0], **SAME)
    for name, one, two in zip(names, results[0][1], results[1][1], strict=True):
        assert (one is None) == (two is None), f"{name} has a gradient in one form only"
        if one is not None:
            assert_close(two, one, **SAME, msg=lambda message, name=name: f"gradient of {name}: {message}")
