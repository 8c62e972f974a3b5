"""What a network consists of and what it costs, without computing anything and without memory for weights.

A copy of the network on torch's meta device, whose tensors have shapes but no numbers, runs one sequence. It counts

    parameters      each once, at its first place: a tied head has none of its own
    FLOPs a token   forward, of one sequence, divided by its length: 2 for every multiplication of a matrix product or
                    convolution. Elementwise work (norms, softmax, rotary, activations, scans written as such) is
                    not counted. A training step takes 3 times as many: the backward pass makes two products of each
    state           bytes that one sequence keeps during generation, from the leaves of `init_state`

Causal attention counts as the whole T x T square, as if nothing were masked, for fused and plain kernels alike:
the convention of 6 N + 12 L D T a token in training (PaLM, arXiv 2204.02311, appendix B). A fused kernel that
skips masked entries does half of that term.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from llmx import display
from llmx.costs.flops import Work, count_flops, on_meta, why_not
from llmx.parts.checks import check_sizes
from llmx.parts.norm import Norm
from llmx.parts.parameter_count import count_bytes, count_parameters
from llmx.protocol import Embedding, FeedForward, Head, Mixer, Network

KINDS = ("embedding", "mixers", "feed-forward", "norms", "head", "other")
_EMBEDDINGS = {Embedding: "embedding", nn.Embedding: "embedding"}
_KIND_OF_TYPE = _EMBEDDINGS | {Mixer: "mixers", FeedForward: "feed-forward", Norm: "norms", Head: "head"}
_KIND_OF_NAME = {"norm": "norms", "head": "head"}  # in networks other than Decoder


@dataclass(frozen=True)
class Layer:
    """One block."""

    layer: int
    mixer: str
    feed_forward: str
    parameters: int
    flops_per_token: float | None  # None if the network cannot run without numbers
    state_bytes: int | None  # None if there is no recurrent form
    runs: int  # how often it runs a token; FLOPs and state are those of all runs


@dataclass(frozen=True)
class PartCosts:
    """One kind of part over all layers; its `shared` parameters are counted with another kind."""

    parameters: int
    shared: int
    flops_per_token: float | None


@dataclass(frozen=True)
class Description:
    """A network by layers and by kinds of parts; the kinds sum to `parameters` and `flops_per_token`."""

    network: str
    vocab_size: int
    length: int
    dtype: str | None  # of the parameters
    layers: tuple[Layer, ...]
    groups: dict[str, PartCosts]  # by kind
    parameters: int
    flops_per_token: float | None
    training_flops_per_token: float | None
    state_bytes: int | None
    uncounted: str | None  # why there are no FLOPs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> RenderableType:
        """For people, in as few as 80 columns."""
        title = f"{self.network}, {self.parameters:,} parameters, vocabulary {self.vocab_size:,}"
        tables = [self._layers(), self._kinds()] if self.layers else [self._kinds()]
        return Lines(Text(title, style="bold"), *tables, Text(self._notes(), style="dim"))

    def _layers(self) -> Table:
        looped = any(layer.runs > 1 for layer in self.layers)
        numbers = ("parameters", "FLOPs\na token", "state\nbytes", *(["runs"] if looped else []))
        rows = display.table("layer", "mixer", "feed-forward", *map(display.number_column, numbers))
        for layer in self.layers:
            state = "recomputes" if layer.state_bytes is None else display.count(layer.state_bytes)
            costs = (display.count(layer.parameters), display.count(layer.flops_per_token), state)
            runs = [str(layer.runs)] if looped else []
            rows.add_row(str(layer.layer), layer.mixer, layer.feed_forward, *costs, *runs)
        return rows

    def _kinds(self) -> Table:
        rows = display.table("part", *map(display.number_column, ("parameters", "%", "FLOPs\na token", "%")))
        for name, part in self.groups.items():
            tied = " (tied to the embedding)" if name == "head" and part.shared and not part.parameters else ""
            size = (display.count(part.parameters), display.share(part.parameters, self.parameters))
            work = (display.count(part.flops_per_token), display.share(part.flops_per_token, self.flops_per_token))
            rows.add_row(f"{name}{tied}", *size, *work)
        rows.add_section()
        whole = (display.count(self.parameters), "", display.count(self.flops_per_token), "")
        rows.add_row("whole network", *whole, style="bold")
        return rows

    def _notes(self) -> str:
        if self.uncounted:
            work = f"not counted, for the network does not run on shapes alone ({self.uncounted})"
        elif not self.flops_per_token:
            work = "0, there are no matrix products"
        else:
            training = f"training takes 3 times as many ({display.count(self.training_flops_per_token)})"
            work = f"forward, a token of a sequence of {self.length:,}, matrix products alone; {training}"
        state = "none, a new token recomputes its whole prefix"
        if self.state_bytes is not None:
            numbers = f", in {self.dtype}" if self.dtype else ""
            state = f"{self.state_bytes:,} bytes a sequence of {self.length:,} tokens{numbers}"
            outside = self.state_bytes - sum(layer.state_bytes or 0 for layer in self.layers)
            if self.layers and outside:
                state += f"; {outside:,} of them are outside the layers"
        return f"FLOPs: {work}.\nState: {state}."


def describe(network: Network, length: int) -> Description:
    """Describes a network on any device without changing it; on the meta device it takes no memory, however large.

    FLOPs and state are those of a sequence of `length` tokens. Raises ValueError for a length below 1, or one that the
    network does not take.
    """
    check_sizes(length=length)
    copied = on_meta(network)
    names = {module: name for name, module in copied.named_modules()}
    kinds, uncounted = _kinds_by_name(copied), None
    try:
        work = count_flops(network, copied, [*(names[block] for block in copied.layers), *kinds], length)
    except (RuntimeError, TypeError) as error:
        work, uncounted = Work(), why_not(error)

    def per_token(flops: int) -> float | None:
        whole, rest = divmod(flops, length)
        return None if uncounted else flops / length if rest else whole

    own, shared = _parameters_by_kind(copied, kinds)
    flops = {kind: sum(work.flops[name] for name, its in kinds.items() if its == kind) for kind in KINDS}
    flops["other"] = work.total - sum(flops.values())
    seen: set[int] = set()
    with torch.device("meta"):
        layers = tuple(
            Layer(
                layer=number,
                mixer=type(block.mixer).__name__,
                feed_forward=type(block.feed_forward).__name__,
                parameters=_new_parameters(block, seen),
                flops_per_token=per_token(work.flops[names[block]]),
                state_bytes=_state_bytes(block, length, times=work.runs[names[block]] or 1),
                runs=work.runs[names[block]] or 1,
            )
            for number, block in enumerate(copied.layers)
        )
        state = _state_bytes(copied, length)
    return Description(
        network=type(network).__name__,
        vocab_size=network.vocab_size,
        length=length,
        dtype=next((str(p.dtype).removeprefix("torch.") for p in network.parameters()), None),
        layers=layers,
        groups={
            kind: PartCosts(own[kind], shared[kind], per_token(flops[kind]))
            for kind in KINDS
            if own[kind] or shared[kind] or flops[kind]
        },
        parameters=count_parameters(network),
        flops_per_token=per_token(work.total),
        training_flops_per_token=per_token(3 * work.total),
        state_bytes=state,
        uncounted=uncounted,
    )


def _state_bytes(component: Any, length: int, times: int = 1) -> int | None:
    return times * count_bytes(component.init_state(1, length)) if component.stateful else None


# ------------------------------------------------------------------------------------------------------ kinds of parts
def _kinds_by_name(network: Network) -> dict[str, str]:
    """Part's name -> its kind. Of nested parts the outermost counts: a norm inside a mixer belongs to the mixer."""
    found: dict[str, str] = {}
    for name, module in network.named_modules():  # each module once, at its first place
        kinds = (kind for cls, kind in _KIND_OF_TYPE.items() if isinstance(module, cls))
        kind = next(kinds, _KIND_OF_NAME.get(name.rpartition(".")[2]))
        if name and kind and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = kind
    return found


def _parameters_by_kind(network: Network, kinds: dict[str, str]) -> tuple[Counter[str], Counter[str]]:
    """For each kind its own parameters, and those that an earlier part shares with it."""
    own, shared, seen = Counter[str](), Counter[str](), set[int]()
    for name, module in network.named_modules():
        inside = next((kind for part, kind in kinds.items() if f"{name}.".startswith(f"{part}.")), "other")
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else own)[inside] += parameter.numel()
            seen.add(id(parameter))
    return own, shared


def _new_parameters(module: nn.Module, seen: set[int]) -> int:
    """Counts the parameters that are not in `seen`, and adds them to it."""
    new = [p for p in module.parameters() if id(p) not in seen]
    seen.update(id(p) for p in new)
    return sum(p.numel() for p in new)
