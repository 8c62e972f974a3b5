"""What a training step costs each device of a run, on paper: memory, communication and arithmetic.

Model states, P parameters on N devices (ZeRO, arXiv 1910.02054), all of them divided by N under fsdp:

    parameters, gradients   P numbers each, of the type of the precision: 4 bytes in bf16-mixed, 2 in bf16-true
    optimizer states        what the config's optimizer really keeps: 8 P bytes and a count a tensor for AdamW
    buffers                 ddp: once more the gradients, from which it reduces. fsdp: two blocks gathered (one at work,
                            one on its way), what is outside of the blocks, and one block's gradients

What the forward pass keeps for the backward pass is counted and not estimated: `losses` runs on fake tensors, which
have a shape, a type and a storage and no numbers, and autograd shows each tensor that it saves. Every storage counts
once, parameters do not. It is linear in the number of sequences. Left out is what lives for a moment: the gradient of
an activation, a kernel's workspace. The largest of these are listed, the gradients of the logits and of their
log-softmax (B T V fp32 numbers each). The sum is an upper bound: the parameters' gradients come as activations go.

Communication of a step, bytes that each device sends (ring algorithms):

    ddp     2 (N-1)/N x gradients                                    an all-reduce
    fsdp    (N-1)/N x (2 x gathered parameters + gradients)          two all-gathers and a reduce-scatter a micro-batch

In mixed precision fsdp gathers 16 bits and reduces fp32 (`llmx.training.sharding.policy`). The trap: under autocast
alone, as with ddp, every weight has a 16-bit copy that lives until the backward pass; gathered parameters would be
copied just so, all of them, on every device.

The count is that of the network as it is written, on a CPU. Compiled it keeps less, for elementwise work is done again;
and a window of up to 256 keeps its T x T attention weights in 16 bits, where a GPU's fused kernel does not.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from llmx.costs.describe import Description, parameters, table
from llmx.errors import UserError
from llmx.protocol import Network

Build = Callable[[], Network]
MakeOptimizer = Callable[[Network], Optimizer]
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # the type of the parameters, and of autocast
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
STRATEGIES = {"auto": "ddp", "ddp": "ddp", "fsdp": "fsdp", "modelparallel": "fsdp"}  # how Lightning's names begin
ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buffers": "buffers of the communication",
    "fixed": "whatever the batch: 16-bit weights, tables",
    "blocks": "activations of the blocks",
    "outside": "activations outside, logits among them",
    "logits_gradients": "gradients of the logits",
    "total": "sum",
}


@dataclass(frozen=True)
class Plan:
    """How a run is spread.

    devices:    all of them, over all nodes
    strategy:   ddp or fsdp
    precision:  a key of PRECISIONS
    sequences:  that a device reads at once, a micro-batch
    accumulate: micro-batches a step
    """

    devices: int
    strategy: str
    precision: str
    sequences: int
    accumulate: int

    @classmethod
    def read(cls, trainer: Any, batch_size: int, precision: str) -> Plan:
        """From the trainer's settings as the command line parses them, and the batch of the whole step.

        Raises:
            UserError: for settings that are none, or not known here.
        """
        devices = _positive("trainer.devices", trainer.devices) * _positive("trainer.num_nodes", trainer.num_nodes)
        named = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy["class_path"]
        begin = named.rpartition(".")[2].lower()
        strategy = next((kind for name, kind in STRATEGIES.items() if begin.startswith(name)), None)
        if strategy is None:
            raise UserError(f"trainer.strategy: {named!r} is not described; there are ddp, fsdp, ModelParallelStrategy")
        precision = SHORT.get(precision, precision)
        if precision not in PRECISIONS:
            raise UserError(f"trainer.precision: {precision!r} is not described; there are {', '.join(PRECISIONS)}")
        accumulate = trainer.accumulate_grad_batches
        sequences, rest = divmod(batch_size, devices * accumulate)
        if rest:
            raise UserError(
                f"data.batch_size: {batch_size} windows a step cannot be cut into {devices * accumulate} equal parts "
                f"({devices} devices, trainer.accumulate_grad_batches {accumulate})"
            )
        return cls(devices, strategy, precision, sequences, accumulate)

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.devices > 1

    @property
    def held(self) -> torch.dtype:
        """Of the parameters between steps."""
        return PRECISIONS[self.precision][0]

    @property
    def lower(self) -> torch.dtype | None:
        """Of autocast."""
        return PRECISIONS[self.precision][1]

    @property
    def at_work(self) -> torch.dtype:
        """Of the parameters that a block reads."""
        return self.lower if self.sharded and self.lower else self.held


@dataclass(frozen=True)
class Budget:
    """What a step costs each device; JSON has all fields.

    memory:        bytes, by the keys of ROWS
    checkpointed:  the same with gradient checkpointing; None for a network without
    flops:         of a step on a device, matrix products alone; None where they are not counted
    flops_checkpointed: with each block's forward pass made twice
    sent:          bytes that a device sends a step
    seconds:       the least that a step takes, for the arithmetic and for the communication; None where the speed of
                   the hardware is not given
    uncounted:     why there are no activations
    """

    plan: Plan
    tokens: int  # of a step, over all devices
    memory: dict[str, int]
    checkpointed: dict[str, int] | None
    flops: int | None
    flops_checkpointed: int | None
    sent: int
    seconds: dict[str, float | None]
    uncounted: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> RenderableType:
        """For people, 80 columns wide if need be."""
        plan = self.plan
        where = "1 device" if plan.devices == 1 else f"{plan.devices:,} devices with {plan.strategy}"
        title = f"A training step on {where}, {plan.precision}, {self.tokens:,} tokens"
        rows = table("memory of a device", numbers=("without", "with gradient\ncheckpointing"))
        for name, said in ROWS.items():
            if name == "total":
                rows.add_section()
            if name in self.memory:
                other = "-" if self.checkpointed is None else _size(self.checkpointed[name])
                rows.add_row(said, _size(self.memory[name]), other)
        return Lines(Text(title, style="bold"), rows, Text(self._said(), style="dim"))

    def _said(self) -> str:
        plan = self.plan
        lines = [f"Micro-batches: {plan.accumulate} a step, of {plan.sequences:,} sequences."]
        if self.uncounted:
            lines = [f"Activations: not counted, for the network does not run on shapes alone ({self.uncounted})."]
        arithmetic = "Arithmetic of a device: not counted"
        if self.flops is not None:
            arithmetic = f"Arithmetic of a device: {self.flops:.3g} FLOPs"
        if self.flops_checkpointed is not None:
            arithmetic += f" ({self.flops_checkpointed:.3g} with gradient checkpointing)"
        lines.append(arithmetic + _at_least(self.seconds["arithmetic"]))
        lines.append(f"Communication of a device: {_size(self.sent)}" + _at_least(self.seconds["communication"]))
        return "\n".join(lines)


def budget(
    build: Build,
    optimizer: MakeOptimizer,
    plan: Plan,
    description: Description,
    peak_flops: float | None = None,
    bandwidth: float | None = None,
) -> Budget:
    """Counts what a step costs; no memory is taken, however large the network.

    Args:
        build: makes the network.
        optimizer: makes the optimizer of the network's parameters.
        plan: how the run is spread.
        description: of the same network, at the length of the sequences.
        peak_flops: FLOPs a second of a device.
        bandwidth: bytes a second that a device sends.

    Raises:
        UserError: for a network without parameters, an optimizer that does not take them or asks for numbers, and a
            speed that is none.
    """
    for name, value in (("peak_flops", peak_flops), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise UserError(f"{name}: {value} is not above 0")
    if not description.parameters:
        raise UserError(f"trainer.devices: {description.network} has no parameters, and so no training step")
    memory = _model_states(build, optimizer, plan, description)
    again: dict[str, int] | None = None
    uncounted = None
    try:
        kept = _kept(build, plan, description.length, checkpointing=False)
        memory |= {
            "fixed": kept.fixed,
            "blocks": plan.sequences * sum(kept.blocks),
            "outside": plan.sequences * kept.outside,
            "logits_gradients": 2 * 4 * plan.sequences * description.length * description.vocab_size,
        }
        with suppress(ValueError):  # of a network that has no checkpointing
            inputs = _kept(build, plan, description.length, checkpointing=True).outside - kept.outside
            again = {**memory, "blocks": plan.sequences * (inputs + max(kept.blocks))}
    except (RuntimeError, TypeError) as error:
        uncounted = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for column in (memory, again):
        if column is not None:
            column["total"] = sum(column.values())

    tokens = plan.devices * plan.accumulate * plan.sequences * description.length
    flops = flops_again = None
    if description.training_flops_per_token is not None:
        flops = round(description.training_flops_per_token * tokens / plan.devices)
        blocks = sum(layer.flops_per_token or 0 for layer in description.layers)
        flops_again = flops + round(blocks * tokens / plan.devices) if again else None
    sent = _sent(plan, description.parameters)
    return Budget(
        plan=plan,
        tokens=tokens,
        memory=memory,
        checkpointed=again,
        flops=flops,
        flops_checkpointed=flops_again,
        sent=sent,
        seconds={
            "arithmetic": flops / peak_flops if flops is not None and peak_flops else None,
            "communication": sent / bandwidth if bandwidth else None,
        },
        uncounted=uncounted,
    )


def _sent(plan: Plan, numbers: int) -> int:
    """Bytes that each device sends a step."""
    if plan.strategy == "fsdp":
        whole = plan.accumulate * numbers * (2 * plan.at_work.itemsize + plan.held.itemsize)
    else:
        whole = 2 * numbers * plan.held.itemsize
    return whole * (plan.devices - 1) // plan.devices


def _model_states(build: Build, optimizer: MakeOptimizer, plan: Plan, description: Description) -> dict[str, int]:
    """Bytes of what a device holds whatever the batch."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = _built(build, plan.held)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        made = optimizer(network)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        try:
            made.step()
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"model.optimizer: {type(made).__name__} makes no step without numbers, so its states are not known"
            ) from error
        leaves = [leaf for state in made.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    memory = {
        "parameters": description.parameters * plan.held.itemsize,
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": sum(leaf.nbytes for leaf in leaves),
    }
    if not plan.sharded:
        return {**memory, "buffers": memory["gradients"] if plan.devices > 1 else 0}
    block = max((parameters(layer) for layer in network.layers), default=0)
    outside = description.parameters - sum(layer.parameters for layer in description.layers)
    memory = {name: -(-whole // plan.devices) for name, whole in memory.items()}
    return {**memory, "buffers": (2 * block + outside) * plan.at_work.itemsize + block * plan.held.itemsize}


def _built(build: Build, dtype: torch.dtype) -> Network:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # and no conversion, which fake parameters refuse
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------------------------------------------- activations
class Kept(NamedTuple):
    """Bytes that the forward pass keeps for the backward pass."""

    fixed: int  # whatever the number of sequences
    outside: int  # of the blocks, a sequence
    blocks: tuple[int, ...]  # one a run of a block, a sequence


def _kept(build: Build, plan: Plan, length: int, checkpointing: bool) -> Kept:
    """From passes of two and of three sequences: one alone lets some copies be views."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", plan.lower, enabled=plan.lower is not None):
        network = _built(build, plan.at_work)
        if checkpointing:
            network.enable_gradient_checkpointing()
        two, three = (_saved(network, sequences, length) for sequences in (2, 3))
    outside, *blocks = (three[run] - two[run] for run in range(max(three) + 1))
    return Kept(3 * sum(two.values()) - 2 * sum(three.values()), outside, tuple(blocks))


def _saved(network: Network, sequences: int, length: int) -> Counter[int]:
    """Bytes that autograd saves in a forward pass, by the run of a block, from 1 on, and at 0 those of no block."""
    seen = {StorageWeakRef(parameter.untyped_storage()) for parameter in network.parameters()}
    found, alive, runs, inside = Counter({0: 0}), list[Tensor](), itertools.count(1), [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if StorageWeakRef(storage) not in seen:
            seen.add(StorageWeakRef(storage))
            alive.append(tensor)
            found[inside[-1]] += storage.nbytes()
        return tensor

    def enter(*_: Any) -> None:
        inside.append(next(runs))

    def leave(*_: Any) -> None:
        inside.pop()

    handles = [
        handle
        for block in network.layers
        for handle in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.losses(tokens, tokens.clone())
    for handle in handles:
        handle.remove()
    return found


# -------------------------------------------------------------------------------------------------------------- reading
def _positive(name: str, given: Any) -> int:
    """A number of devices; a list of them has one."""
    number = len(given) if isinstance(given, list) else int(given) if str(given).lstrip("-").isdecimal() else None
    if number is None or number < 1:
        raise UserError(f"{name}: {given!r} is no number of devices to describe, which is 1 or more")
    return number


def _size(count: int) -> str:
    """In decimal units, three digits: 13.5 GB."""
    power = min(4, int(math.log10(max(count, 1))) // 3)
    value = count / 1000**power
    digits = 2 - int(math.log10(value)) if power else 0
    return f"{value:,.{max(digits, 0)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _at_least(seconds: float | None) -> str:
    return "." if seconds is None else f", at least {seconds:.3g} s."
