"""The bytes that a forward pass keeps for the backward pass: counted, not estimated, and without memory for them.

`losses` runs on fake tensors, which have a shape, a type and a storage but no numbers. Autograd shows each tensor that
it saves. Every storage counts once; parameters do not count. The bytes are linear in the number of sequences.

The count is that of the network as it is written, on a CPU. A compiled network keeps less, because it repeats
elementwise work. A window of up to 256 keeps its T x T attention weights in 16 bits; a GPU's fused kernel keeps none.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from llmx.protocol import Network

Build = Callable[[], Network]


class Kept(NamedTuple):
    """Bytes that the forward pass keeps."""

    fixed: int  # whatever the number of sequences
    outside: int  # outside the blocks, a sequence
    blocks: tuple[int, ...]  # one for each run of a block, a sequence


def kept_activations(
    build: Build, dtype: torch.dtype, autocast: torch.dtype | None, length: int, checkpointing: bool
) -> Kept:
    """Compares passes of two and of three sequences of `length` tokens; with a single one some copies would be views.

    `dtype` is that of the parameters. Raises ValueError for a network without gradient checkpointing, and RuntimeError
    or TypeError for one that does not run without numbers.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", autocast, enabled=autocast is not None):
        network = build_as(dtype, build)
        if checkpointing:
            network.enable_gradient_checkpointing()
        two, three = (_saved(network, sequences, length) for sequences in (2, 3))
    outside, *blocks = (three[run] - two[run] for run in range(max(three) + 1))
    return Kept(3 * sum(two.values()) - 2 * sum(three.values()), outside, tuple(blocks))


def build_as(dtype: torch.dtype, build: Build) -> Network:
    """Builds with parameters of a type. A conversion afterwards would fail: fake parameters refuse it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def _saved(network: Network, sequences: int, length: int) -> Counter[int]:
    """Bytes that autograd saves in a forward pass: from 1 on by the run of a block, at 0 outside the blocks."""
    seen = {StorageWeakRef(parameter.untyped_storage()) for parameter in network.parameters()}
    found, alive, runs, inside = Counter({0: 0}), list[Tensor](), itertools.count(1), [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if StorageWeakRef(storage) not in seen:
            seen.add(StorageWeakRef(storage))
            alive.append(tensor)
            found[inside[-1]] += storage.nbytes()
        return tensor

    def leave(*_: Any) -> None:
        inside.pop()

    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    with ExitStack() as hooks:
        for block in network.layers:
            hooks.enter_context(block.register_forward_pre_hook(lambda *_: inside.append(next(runs))))
            hooks.enter_context(block.register_forward_hook(leave))
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        network.losses(tokens, tokens.clone())
    return found
