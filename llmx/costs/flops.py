"""The FLOPs of a forward pass, in total and by module.

The trap: on a CPU the fused attention kernel counts as 0 (`FlopCounterMode`, torch 2.13). On the meta device it is
taken apart into its two products. Networks that need numbers (a router that counts its tokens) run on the CPU; for
them a formula of the same size is registered.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from llmx.errors import one_line
from llmx.protocol import Network

_FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Work:
    """The FLOPs of a forward pass, in total and by the name of a module, and how often each module ran."""

    total: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)


def count_flops(network: Network, without_numbers: Network, names: list[str], length: int) -> Work:
    """Counts on the copy without numbers or, if that fails, on a copy of a network that has numbers.

    Raises RuntimeError or TypeError if neither works.
    """
    try:
        with torch.device("meta"):
            return forward_flops(without_numbers, names, length)
    except (RuntimeError, TypeError):
        if any(tensor.is_meta for tensor in _tensors(network)):
            raise
        return forward_flops(copy.deepcopy(network), names, length)


def forward_flops(network: Network, names: list[str], length: int) -> Work:
    """Runs the network on one sequence; `names` are the modules to count one by one."""
    work, begun = Work(), list[int]()
    formulas = {_FUSED_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)

    def leave(name: str, *_: Any) -> None:
        work.flops[name] += counter.get_total_flops() - begun.pop()
        work.runs[name] += 1

    for name in names:
        module = network.get_submodule(name)
        module.register_forward_pre_hook(lambda *_: begun.append(counter.get_total_flops()))
        module.register_forward_hook(partial(leave, name))
    device = next((tensor.device for tensor in _tensors(network)), torch.device("cpu"))
    with torch.no_grad(), counter:
        network.eval()(torch.zeros(1, length, dtype=torch.int64, device=device))
    work.total = counter.get_total_flops()
    return work


def on_meta(network: Network) -> Network:
    """A copy on the meta device, made without copying any numbers."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(network):
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    result = copy.deepcopy(network, memo)
    for module in result.modules():  # tensors that are plain attributes
        vars(module).update({name: v.to("meta") for name, v in vars(module).items() if isinstance(v, Tensor)})
    return result


def why_not(error: Exception) -> str:
    """One line that says why torch could not run a network on shapes alone."""
    return f"{type(error).__name__}: {one_line(error, 200)}"


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(network.parameters(), network.buffers())
