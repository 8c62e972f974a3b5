"""Sharding, for a network that is larger than a device: FSDP2, the third stage of ZeRO (arXiv 1910.02054).

Every process keeps 1/N of each parameter, of its gradient and of the optimizer's moments. A block is gathered whole
while it runs, forward and backward. What stands outside the blocks (embedding, last norm, head) is gathered from its
first use to its last. The trap: torch gathers at a module's `forward`. Training calls `losses`, so torch has to be told
that name.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.modules.module import register_module_module_registration_hook

from llmx.errors import UserError
from llmx.protocol import Block, Network


def sharded(network: Network, build: Callable[[], Network], trainer: pl.Trainer, device: str) -> Network:
    """The network in shards over all processes of a trainer; UserError if it cannot be sharded.

    The network has the same weights in every process, or is on the meta device. In the second case `build` makes it
    anew, block by block, from the current state of the random numbers. No process ever holds it whole.
    """
    mesh = init_device_mesh(device, (trainer.world_size,))
    mixed = policy(str(trainer.precision))
    try:
        if any(parameter.is_meta for parameter in network.parameters()):
            return build_sharded(build, mesh, mixed)
        return shard(network, mesh, mixed)
    except ValueError as error:
        raise UserError(f"trainer.strategy: this network cannot be sharded: {error}") from error


def policy(precision: str) -> MixedPrecisionPolicy:
    """Under autocast parameters are gathered in 16 bits, and gradients are summed in 32.

    If they were gathered in 32 bits, autocast would keep a 16-bit copy of every weight beside it until the backward
    pass. The price: gains, rates and the residual stream have 16 bits too. Autocast alone leaves them in 32.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return MixedPrecisionPolicy(half, half and torch.float32, cast_forward_inputs=False)


def shard(network: Network, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Network:
    """Shards a network that every process holds with the same weights: each block, and the rest together. Raises
    ValueError for a parameter without dimensions, which cannot be cut."""
    for module in reversed(list(network.modules())):  # a block inside another one first
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return _shard_rest(network, mesh, policy)


def build_sharded(build: Callable[[], Network], mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Network:
    """Builds a network that no process ever holds whole: each block is sharded as soon as it exists.

    The components initialise themselves, as ever. Under one seed the weights are therefore the same as those of a
    network that is built whole. A process holds at most one block and the parts outside the blocks whole at a time.
    Raises ValueError as `shard` does.
    """

    def shard_block(parent: nn.Module, name: str, module: Any) -> None:
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)

    hook = register_module_module_registration_hook(shard_block)
    try:
        network = build()
    finally:
        hook.remove()
    return _shard_rest(network, mesh, policy)


def _shard_rest(network: Network, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Network:
    fully_shard(network, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(network, "losses")
    return network
