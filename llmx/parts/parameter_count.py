"""Sizes of a module and of a state. Both also work on the meta device, where tensors have no numbers."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def count_parameters(module: nn.Module) -> int:
    """The numbers in all parameters; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(state: Any) -> int:
    """The bytes of all tensors in a pytree, such as a mixer's state."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
