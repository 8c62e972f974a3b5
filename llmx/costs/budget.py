"""The memory, communication and arithmetic of a training step on each device of a run, without running it.

Model states, P parameters on N devices (ZeRO, arXiv 1910.02054), all of them divided by N under fsdp:

    parameters, gradients   P numbers each, of the type of the precision: 4 bytes in bf16-mixed, 2 in bf16-true
    optimizer states        counted in the config's optimizer: 8 P bytes and a count a tensor for AdamW
    buffers                 ddp: a copy of the gradients, from which it reduces. fsdp: two gathered blocks (one at work,
                            one on its way), all parameters outside the blocks, and one block's gradients

`llmx.costs.activations` counts the activations. Not listed are short-lived tensors: the gradient of an activation, a
kernel's workspace. Listed are only the largest of them, the gradients of the logits and of their log-softmax (B T V
fp32 numbers each). The sum is an upper bound: the parameters' gradients arrive while activations are freed.

Communication of a step, bytes that each device sends (ring algorithms):

    ddp     2 (N-1)/N x gradients                                    an all-reduce
    fsdp    (N-1)/N x (2 x gathered parameters + gradients)          two all-gathers and a reduce-scatter a micro-batch

In mixed precision fsdp gathers 16 bits and reduces fp32 (`llmx.training.sharding.policy`). The trap: under autocast
alone, as with ddp, every weight has a 16-bit copy that lives until the backward pass. Gathered parameters would be
copied the same way, all of them, on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from llmx import display
from llmx.costs.activations import Build, build_as, kept_activations
from llmx.costs.describe import Description
from llmx.costs.flops import why_not
from llmx.errors import UserError
from llmx.parts.parameter_count import count_bytes, count_parameters
from llmx.protocol import Network

MakeOptimizer = Callable[[Network], Optimizer]
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # types of the parameters and of autocast
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
    """How a run is distributed."""

    devices: int  # of all nodes together
    strategy: str  # ddp or fsdp
    precision: str  # a key of PRECISIONS
    sequences: int  # of a micro-batch on one device
    accumulate: int  # micro-batches a step

    @classmethod
    def read(cls, trainer: Any, batch_size: int, precision: str) -> Plan:
        """Reads the trainer's parsed settings; `batch_size` is that of the whole step.

        Raises UserError for settings that are invalid or not supported here.
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
            parts = (
                f"{devices * accumulate} equal parts ({devices} devices, trainer.accumulate_grad_batches {accumulate})"
            )
            raise UserError(f"data.batch_size: {batch_size} windows a step cannot be cut into {parts}")
        return cls(devices, strategy, precision, sequences, accumulate)

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.devices > 1

    @property
    def held(self) -> torch.dtype:
        """Type of the parameters between steps."""
        return PRECISIONS[self.precision][0]

    @property
    def at_work(self) -> torch.dtype:
        """Type of the parameters that a block reads."""
        lower = PRECISIONS[self.precision][1]
        return lower if self.sharded and lower else self.held


@dataclass(frozen=True)
class Budget:
    """The costs of a step on each device; JSON has all fields."""

    plan: Plan
    tokens: int  # of a step, over all devices
    memory: dict[str, int]  # bytes, by the keys of ROWS
    checkpointed: dict[str, int] | None  # memory with gradient checkpointing; None for a network without it
    flops: int | None  # of a step on a device, matrix products alone; None if not counted
    flops_checkpointed: int | None  # the same with each block's forward pass run twice
    sent: int  # bytes that a device sends a step
    seconds: dict[str, float | None]  # the least for arithmetic and communication; None if the speed is not given
    uncounted: str | None  # why there are no activations

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> RenderableType:
        """For people, in as few as 80 columns."""
        plan = self.plan
        where = "1 device" if plan.devices == 1 else f"{plan.devices:,} devices with {plan.strategy}"
        title = f"A training step on {where}, {plan.precision}, {self.tokens:,} tokens"
        numbers = map(display.number_column, ("without", "with gradient\ncheckpointing"))
        rows = display.table("memory of a device", *numbers)
        for name, said in ROWS.items():
            if name == "total":
                rows.add_section()
            if name in self.memory:
                other = "-" if self.checkpointed is None else display.size(self.checkpointed[name])
                rows.add_row(said, display.size(self.memory[name]), other)
        return Lines(Text(title, style="bold"), rows, Text(self._notes(), style="dim"))

    def _notes(self) -> str:
        plan = self.plan
        first = f"Micro-batches: {plan.accumulate} a step, of {plan.sequences:,} sequences."
        if self.uncounted:
            first = f"Activations: not counted, for the network does not run on shapes alone ({self.uncounted})."
        work = "not counted" if self.flops is None else f"{self.flops:.3g} FLOPs"
        if self.flops_checkpointed is not None:
            work += f" ({self.flops_checkpointed:.3g} with gradient checkpointing)"
        arithmetic = f"Arithmetic of a device: {work}{_at_least(self.seconds['arithmetic'])}"
        sent = f"Communication of a device: {display.size(self.sent)}{_at_least(self.seconds['communication'])}"
        return f"{first}\n{arithmetic}\n{sent}"


def budget(
    build: Build,
    optimizer: MakeOptimizer,
    plan: Plan,
    description: Description,
    peak_flops: float | None = None,
    bandwidth: float | None = None,
) -> Budget:
    """Counts the costs of a step, without memory for weights, however large the network is.

    The description has the same network, at the length of the sequences. A device computes `peak_flops` FLOPs and sends
    `bandwidth` bytes a second. Raises UserError for a network without parameters, an optimizer that refuses them or
    needs numbers, and a speed that is not above 0.
    """
    for name, value in (("peak_flops", peak_flops), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise UserError(f"{name}: {value} is not above 0")
    if not description.parameters:
        raise UserError(f"trainer.devices: {description.network} has no parameters, and so no training step")
    memory = _model_states(build, optimizer, plan, description)
    checkpointed: dict[str, int] | None = None
    uncounted = flops = flops_checkpointed = None
    try:
        counted = (build, plan.at_work, PRECISIONS[plan.precision][1], description.length)
        kept = kept_activations(*counted, checkpointing=False)
        memory |= {
            "fixed": kept.fixed,
            "blocks": plan.sequences * sum(kept.blocks),
            "outside": plan.sequences * kept.outside,
            "logits_gradients": 2 * 4 * plan.sequences * description.length * description.vocab_size,
        }
        with suppress(ValueError):  # the network has no checkpointing
            inputs = kept_activations(*counted, checkpointing=True).outside - kept.outside
            checkpointed = {**memory, "blocks": plan.sequences * (inputs + max(kept.blocks))}
    except (RuntimeError, TypeError) as error:
        uncounted = why_not(error)
    for column in filter(None, (memory, checkpointed)):
        column["total"] = sum(column.values())
    tokens = plan.devices * plan.accumulate * plan.sequences * description.length
    if description.training_flops_per_token is not None:
        flops = round(description.training_flops_per_token * tokens / plan.devices)
        blocks = sum(layer.flops_per_token or 0 for layer in description.layers)
        flops_checkpointed = flops + round(blocks * tokens / plan.devices) if checkpointed else None
    sent = _sent(plan, description.parameters)
    seconds = {
        "arithmetic": flops / peak_flops if flops is not None and peak_flops else None,
        "communication": sent / bandwidth if bandwidth else None,
    }
    return Budget(plan, tokens, memory, checkpointed, flops, flops_checkpointed, sent, seconds, uncounted)


def _sent(plan: Plan, numbers: int) -> int:
    """Bytes that each device sends a step."""
    fsdp = plan.accumulate * (2 * plan.at_work.itemsize + plan.held.itemsize)
    a_number = fsdp if plan.strategy == "fsdp" else 2 * plan.held.itemsize
    return numbers * a_number * (plan.devices - 1) // plan.devices


def _model_states(build: Build, optimizer: MakeOptimizer, plan: Plan, description: Description) -> dict[str, int]:
    """Bytes that a device holds, whatever the batch."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = build_as(plan.held, build)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        made = optimizer(network)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        try:
            made.step()
        except (RuntimeError, TypeError) as error:
            what = f"{type(made).__name__} makes no step without numbers, so its states are not known"
            raise UserError(f"model.optimizer: {what}") from error
        memory = {
            "parameters": description.parameters * plan.held.itemsize,
            "gradients": sum(parameter.nbytes for parameter in trained),
            "optimizer": count_bytes(dict(made.state)),
        }
    if not plan.sharded:
        return {**memory, "buffers": memory["gradients"] if plan.devices > 1 else 0}
    block = max((count_parameters(layer) for layer in network.layers), default=0)
    outside = description.parameters - sum(layer.parameters for layer in description.layers)
    memory = {name: -(-whole // plan.devices) for name, whole in memory.items()}
    return {**memory, "buffers": (2 * block + outside) * plan.at_work.itemsize + block * plan.held.itemsize}


def _positive(name: str, given: Any) -> int:
    """A number of devices, given as such or as a list of devices."""
    number = len(given) if isinstance(given, list) else int(given) if str(given).lstrip("-").isdecimal() else None
    if number is None or number < 1:
        raise UserError(f"{name}: {given!r} is no number of devices to describe, which is 1 or more")
    return number


def _at_least(seconds: float | None) -> str:
    return "." if seconds is None else f", at least {display.seconds(seconds)}."
