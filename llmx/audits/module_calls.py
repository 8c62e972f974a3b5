"""The calls of all modules in a forward pass, and the search for the first module that leaks."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmx.audits.rounding import relative_change
from llmx.protocol import Logits, Network


class ModuleCall(NamedTuple):
    """One call of a module: its input and output tensors as they were."""

    module: str
    module_class: str
    inputs: list[Tensor]
    outputs: list[Tensor]


ModuleCalls = dict[tuple[str, int], ModuleCall]  # by module and number of its call, in the order in which calls end
ForwardPass = Callable[..., Logits]  # AuditedNetwork.run with all arguments but `calls` given
Part = Callable[[Tensor], list[Tensor]]  # what must not change in a tensor; several readings if axes are ambiguous


def record_calls(network: Network, calls: ModuleCalls) -> None:
    """Makes every module of a network write its calls into `calls`."""
    names = {module: name for name, module in network.named_modules()}
    entered: list[list[Tensor]] = []
    count: Counter[str] = Counter()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(_tensors((args, kwargs)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name = names[module]
        calls[name, count[name]] = ModuleCall(name, type(module).__name__, entered.pop(), _tensors(output))
        count[name] += 1

    for module in names:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)


def _tensors(value: Any) -> list[Tensor]:
    """Copies of the tensors in nested containers, real and in float64."""
    if isinstance(value, Tensor):
        real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return [real.detach().to(torch.float64, copy=True)]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []


def first_leaking_module(
    first: ForwardPass, second: ForwardPass, part: Part, part2: Part, tolerance: float
) -> ModuleCall | None:
    """The first module whose output differs between two passes although its inputs agree."""
    calls, calls2 = ModuleCalls(), ModuleCalls()
    first(calls=calls)
    second(calls=calls2)

    def differ(tensors: list[Tensor], tensors2: list[Tensor]) -> bool:
        for one, two in zip(tensors, tensors2, strict=False):
            pairs = [(a, b) for a, b in product(part(one), part2(two)) if a.shape == b.shape and a.numel()]
            # tensors differ only if every reading does: a wrong reading includes what may change
            if pairs and min(relative_change(a, b).max().item() for a, b in pairs) > tolerance:
                return True
        return False

    both = [(call, calls2[key]) for key, call in calls.items() if key in calls2]
    return next((a for a, b in both if differ(a.outputs, b.outputs) and not differ(a.inputs, b.inputs)), None)
