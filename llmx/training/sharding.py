"""A network in shares, for one that is larger than a device: FSDP2, which is ZeRO's third stage (arXiv 1910.02054).

Every process keeps 1/N of each parameter, of its gradient and of the optimizer's moments. A block is gathered whole
while it runs, forward and backward; what stands outside the blocks (embedding, last norm, head) from its first use to
its last. The trap: torch gathers at a module's `forward`, and training calls `losses`, which has to be named to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.modules.module import register_module_module_registration_hook

from llmx.protocol import Block, Network


def policy(precision: str) -> MixedPrecisionPolicy:
    """Under autocast parameters are gathered in 16 bits, and gradients summed in 32.

    Gathered in 32, every weight would have a 16-bit copy of autocast's beside it until the backward pass. The price:
    gains, rates and the residual stream have 16 bits too, which autocast alone leaves in 32.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return MixedPrecisionPolicy(half, half and torch.float32, cast_forward_inputs=False)


def shard(network: Network, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Network:
    """Shards a network that every process holds with the same weights: each block, and the rest together.

    Raises:
        ValueError: for a parameter without dimensions, which cannot be cut.
    """
    for module in reversed(list(network.modules())):  # a block inside another one first
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return _closed(network, mesh, policy)


def build_sharded(build: Callable[[], Network], mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Network:
    """Builds a network that no process ever holds whole: each block is sharded as soon as it exists.

    The components initialise themselves, as ever, so under one seed the weights are those of a network that is built
    at once. At most one block and what stands outside the blocks are whole at a time.

    Raises:
        ValueError: for a parameter without dimensions, which cannot be cut.
    """

    def spread(parent: nn.Module, name: str, module: Any) -> None:
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)

    hook = register_module_module_registration_hook(spread)
    try:
        network = build()
    finally:
        hook.remove()
    return _closed(network, mesh, policy)


def _closed(network: Network, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Network:
    fully_shard(network, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(network, "losses")
    return network
