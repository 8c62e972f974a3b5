"""Copies of a network for the audits: in float64, with moved weights. The caller's random state stays as it was."""

import copy
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from llmx.protocol import Network

EXACT = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
EXACT[torch.complex64] = torch.complex128


def copy_network(network: Network, share_parameters: bool = False) -> Network:
    """A deep copy. A tensor that a module keeps from its last pass is copied without its autograd history."""
    deepcopy = Tensor.__deepcopy__
    memo: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()} if share_parameters else {}
    with (
        patch.object(Tensor, "__deepcopy__", lambda x, memo: deepcopy(x if x.is_leaf else x.detach(), memo)),
        patch.object(nn.Module, "__deepcopy__", _copy_module, create=True),
    ):
        return copy.deepcopy(network, memo)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` does by itself, in a third of the time: a module has a dozen empty dictionaries of hooks."""
    copied = memo[id(module)] = module.__new__(type(module))
    state: Any = module.__getstate__()
    fresh = {
        name: type(value)() if type(value) in (dict, OrderedDict) and not value else copy.deepcopy(value, memo)
        for name, value in state.items()
    }
    copied.__setstate__(fresh)
    return copied


def exact_copy(network: Network) -> Network:
    """A copy on the CPU in float64, plain tensor attributes included."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", EXACT.get(tensor.dtype, tensor.dtype))

    network = copy_network(network)._apply(exact)
    for module in network.modules():
        vars(module).update({name: exact(value) for name, value in vars(module).items() if isinstance(value, Tensor)})
    return network


def perturbed_copy(network: Network, scale: float, generator: torch.Generator) -> Network:
    """A copy whose weights are moved by about `scale`, wide matrices by less."""
    network = copy_network(network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            width = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.add_(noise.to(parameter.device) * scale * min(1.0, 5 / math.sqrt(width)))
        parameter.requires_grad_(False)
    network.after_optimizer_step()
    return network


def seed_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def preserve_rng_state(eager: bool = True) -> Iterator[None]:
    """Restores the caller's random state at the end. Compiles nothing inside, unless `eager` is false."""
    compiling = eager and "torch._dynamo" in sys.modules  # importing it takes a second
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager") if compiling else nullcontext():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
