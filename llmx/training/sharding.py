"""A network in shares, for one that is larger than a device: FSDP2, which is ZeRO's third stage (arXiv 1910.02054).

Every process keeps 1/N of each parameter, of its gradient and of the optimizer's moments. A block is gathered whole
while it runs, forward and backward; what stands outside the blocks (embedding, last norm, head) from its first use to
its last. The trap: torch gathers at a module's `forward`, and training calls `losses`, which has to be named to it.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.modules.module import register_module_module_registration_hook

from llmx.protocol import Block, Network


def shard(network: Network, mesh: DeviceMesh) -> Network:
    """Shards a network that every process holds with the same weights: each block, and the rest together.

    Raises:
        ValueError: for a parameter without dimensions, which cannot be cut.
    """
    for module in reversed(list(network.modules())):  # a block inside another one first
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return _closed(network, mesh)


def build_sharded(build: Callable[[], Network], mesh: DeviceMesh) -> Network:
    """Builds a network that no process ever holds whole: each block is sharded as soon as it exists.

    The components initialise themselves, as ever, so under one seed the weights are those of a network that is built
    at once. At most one block and what stands outside the blocks are whole at a time.

    Raises:
        ValueError: for a parameter without dimensions, which cannot be cut.
    """

    def spread(parent: nn.Module, name: str, module: Any) -> None:
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)

    hook = register_module_module_registration_hook(spread)
    try:
        network = build()
    finally:
        hook.remove()
    return _closed(network, mesh)


def _closed(network: Network, mesh: DeviceMesh) -> Network:
    fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(network, "losses")
    return network
