"""What a network is made of and what it costs, on paper: nothing is computed and no memory is taken.

A copy of the network on torch's meta device, whose tensors have shapes and no numbers, runs one sequence. Counted are

    parameters      each once, where it stands first: a tied head has none of its own
    FLOPs a token   forward, of one sequence, divided by its length: 2 for every multiplication of a matrix product or
                    convolution. Elementwise work (norms, softmax, rotary, activations, scans written as such) is
                    not counted. A training step takes 3 times as many: the backward pass makes two products of each
    state           bytes that one sequence keeps while it is generated, from the leaves of `init_state`

Causal attention is counted as the whole T x T square, as if nothing were masked, whether its kernel is fused or written
out: the convention of 6 N + 12 L D T a token in training (PaLM, arXiv 2204.02311, appendix B). A fused kernel that
skips what is masked does half of that term.

The trap: on a CPU the fused attention kernel counts as 0 (`FlopCounterMode`, torch 2.13). On the meta device it is
taken apart into its two products; for the networks that run there only by their numbers (a router that
counts its tokens), a formula of the same size is registered.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import rich
import torch
from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from llmx.parts.norm import Norm
from llmx.protocol import Embedding, FeedForward, Head, Mixer, Network

MATCHED = 0.05  # the most that costs may be apart to be called equal
GROUPS = ("embedding", "mixers", "feed-forward", "norms", "head", "other")
_GROUP_OF_TYPE: dict[type, str] = {
    Embedding: "embedding",
    nn.Embedding: "embedding",
    Mixer: "mixers",
    FeedForward: "feed-forward",
    Norm: "norms",
    Head: "head",
}
_GROUP_OF_NAME = {"norm": "norms", "head": "head"}  # in a network that is no Decoder


@dataclass(frozen=True)
class Layer:
    """One block.

    runs:            how often it runs a token; its FLOPs and state are those of all runs
    flops_per_token: None where the network cannot be run without numbers
    state_bytes:     None where there is no recurrent form
    """

    layer: int
    mixer: str
    feed_forward: str
    parameters: int
    flops_per_token: float | None
    state_bytes: int | None
    runs: int


@dataclass(frozen=True)
class Group:
    """One kind of part, over all layers; `shared` parameters are counted in another group."""

    parameters: int
    shared: int
    flops_per_token: float | None


@dataclass(frozen=True)
class Description:
    """A network, layer by layer and by groups; the groups sum to `parameters` and `flops_per_token`."""

    network: str
    vocab_size: int
    length: int
    dtype: str | None  # of the parameters
    layers: tuple[Layer, ...]
    groups: dict[str, Group]
    parameters: int
    flops_per_token: float | None
    training_flops_per_token: float | None
    state_bytes: int | None
    uncounted: str | None  # why there are no FLOPs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, format: Literal["table", "json"] = "table") -> None:
        """Prints it."""
        if format == "json":
            print(json.dumps(self.to_dict(), indent=2))
        else:
            rich.print(self.render())

    def render(self) -> RenderableType:
        """For people, 80 columns wide if need be."""
        title = f"{self.network}, {self.parameters:,} parameters, vocabulary {self.vocab_size:,}"
        parts: list[RenderableType] = [Text(title, style="bold")]
        if self.layers:
            parts.append(self._layers())
        return Lines(*parts, self._groups(), Text(self._said(), style="dim"))

    def _layers(self) -> Table:
        looped = any(layer.runs > 1 for layer in self.layers)
        numbers = ("parameters", "FLOPs\na token", "state\nbytes", *(["runs"] if looped else []))
        rows = table("layer", "mixer", "feed-forward", numbers=numbers)
        for layer in self.layers:
            state = "recomputes" if layer.state_bytes is None else f"{layer.state_bytes:,}"
            cells = [str(layer.layer), layer.mixer, layer.feed_forward, f"{layer.parameters:,}"]
            cells += [_number(layer.flops_per_token), state]
            rows.add_row(*cells, *([str(layer.runs)] if looped else []))
        return rows

    def _groups(self) -> Table:
        rows = table("part", numbers=("parameters", "%", "FLOPs\na token", "%"))
        for name, group in self.groups.items():
            tied = " (tied to the embedding)" if name == "head" and group.shared and not group.parameters else ""
            size = (f"{group.parameters:,}", _share(group.parameters, self.parameters))
            work = (_number(group.flops_per_token), _share(group.flops_per_token, self.flops_per_token))
            rows.add_row(f"{name}{tied}", *size, *work)
        rows.add_section()
        rows.add_row("whole network", f"{self.parameters:,}", "", _number(self.flops_per_token), "", style="bold")
        return rows

    def _said(self) -> str:
        if self.uncounted:
            work = f"not counted, for the network does not run on shapes alone ({self.uncounted})"
        elif not self.flops_per_token:
            work = "0, there are no matrix products"
        else:
            training = _number(self.training_flops_per_token)
            work = (
                f"forward, a token of a sequence of {self.length:,}, matrix products alone; "
                f"training takes 3 times as many ({training})"
            )
        state = "none, a new token recomputes its whole prefix"
        if self.state_bytes is not None:
            numbers = f", in {self.dtype}" if self.dtype else ""
            state = f"{self.state_bytes:,} bytes a sequence of {self.length:,} tokens{numbers}"
            outside = self.state_bytes - sum(layer.state_bytes or 0 for layer in self.layers)
            if self.layers and outside:
                state += f"; {outside:,} of them are outside the layers"
        return f"FLOPs: {work}.\nState: {state}."


def apart(costs: Iterable[float | None]) -> float:
    """By how much the largest exceeds the smallest, as a share of it; what costs nothing, or is not known, is left
    aside."""
    known = [cost for cost in costs if cost]
    return max(known) / min(known) - 1 if known else 0.0


def describe(network: Network, length: int) -> Description:
    """Describes a network, which stays as it is.

    Args:
        network: on any device; on the meta device it takes no memory, however large.
        length: tokens of the sequence whose FLOPs and state are given.

    Raises:
        ValueError: for a length below 1, or one that the network does not take.
    """
    if length < 1:
        raise ValueError(f"length: {length} is below 1")
    paper = _on_meta(network)
    names = {module: name for name, module in paper.named_modules()}
    parts = _parts(paper)
    watched = [*(names[block] for block in paper.layers), *parts]
    try:
        work, uncounted = _counted(network, paper, watched, length), None
    except (RuntimeError, TypeError) as error:
        work, uncounted = Work(), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def per_token(flops: int) -> float | None:
        whole, rest = divmod(flops, length)
        return None if uncounted else flops / length if rest else whole

    own, shared = _parameters(paper, parts)
    flops = {part: sum(work.flops[name] for name, group in parts.items() if group == part) for part in GROUPS}
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
                state_bytes=(work.runs[names[block]] or 1) * _bytes(block, length) if block.stateful else None,
                runs=work.runs[names[block]] or 1,
            )
            for number, block in enumerate(paper.layers)
        )
        state = _bytes(paper, length) if paper.stateful else None
    return Description(
        network=type(network).__name__,
        vocab_size=network.vocab_size,
        length=length,
        dtype=next((str(p.dtype).removeprefix("torch.") for p in network.parameters()), None),
        layers=layers,
        groups={
            part: Group(own[part], shared[part], per_token(flops[part]))
            for part in GROUPS
            if own[part] or shared[part] or flops[part]
        },
        parameters=parameters(network),
        flops_per_token=per_token(work.total),
        training_flops_per_token=per_token(3 * work.total),
        state_bytes=state,
        uncounted=uncounted,
    )


def parameters(network: nn.Module) -> int:
    """Numbers to train, shared ones counted once."""
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------------------------------------------------- counting
class Work:
    """The FLOPs of a forward pass: in total, and in modules by name, with how often each of them ran."""

    def __init__(self) -> None:
        self.total = 0
        self.flops: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()


def _counted(network: Network, paper: Network, watched: list[str], length: int) -> Work:
    """On paper if it can be, else on a copy of the network itself, unless that has no numbers either."""
    try:
        with torch.device("meta"):
            return _forward(paper, watched, length)
    except (RuntimeError, TypeError):
        if any(tensor.is_meta for tensor in _tensors(network)):
            raise
        return _forward(copy.deepcopy(network), watched, length)


def _forward(network: Network, watched: list[str], length: int) -> Work:
    """One forward pass of one sequence."""
    work, begun = Work(), list[int]()

    def enter(*_: Any) -> None:
        begun.append(counter.get_total_flops())

    def leave(name: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            work.flops[name] += counter.get_total_flops() - begun.pop()
            work.runs[name] += 1

        return add

    for name in watched:
        module = network.get_submodule(name)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave(name))
    device = next((tensor.device for tensor in _tensors(network)), torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={_FUSED_ON_CPU: _attention_flops}) as counter:
        network.eval()(torch.zeros(1, length, dtype=torch.int64, device=device))
    work.total = counter.get_total_flops()
    return work


_FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _on_meta(network: Network) -> Network:
    """A copy without numbers, made without copying any."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(network):
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    paper = copy.deepcopy(network, memo)
    for module in paper.modules():  # tensors that are plain attributes
        vars(module).update({name: v.to("meta") for name, v in vars(module).items() if isinstance(v, Tensor)})
    return paper


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(network.parameters(), network.buffers())


# ------------------------------------------------------------------------------------------------------------- grouping
def _parts(network: Network) -> dict[str, str]:
    """The group of each part by the part's name, of parts inside parts the outermost: the norm inside a mixer is
    the mixer's."""
    found: dict[str, str] = {}

    def look(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            group = _group(child, child_name)
            if group is None:
                look(child, full)
            else:
                found[full] = group

    look(network, "")
    first = {name for name, _ in network.named_modules()}  # a module that stands in two places is found at the first
    return {name: group for name, group in found.items() if name in first}


def _group(module: nn.Module, name: str) -> str | None:
    return next((group for cls, group in _GROUP_OF_TYPE.items() if isinstance(module, cls)), _GROUP_OF_NAME.get(name))


def _parameters(network: Network, parts: dict[str, str]) -> tuple[Counter[str], Counter[str]]:
    """Of each group the parameters that are its own, and those that were counted before."""
    own, shared, seen = Counter[str](), Counter[str](), set[int]()
    for name, module in network.named_modules():
        inside = next((group for part, group in parts.items() if f"{name}.".startswith(f"{part}.")), "other")
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else own)[inside] += parameter.numel()
            seen.add(id(parameter))
    return own, shared


def _new_parameters(module: nn.Module, seen: set[int]) -> int:
    """Numbers in the parameters that are not among those seen, which they join."""
    new = [p for p in module.parameters() if id(p) not in seen]
    seen.update(id(p) for p in new)
    return sum(p.numel() for p in new)


def _bytes(component: Any, length: int) -> int:
    """What one sequence of `length` tokens keeps in the state."""
    leaves = tree_leaves(component.init_state(1, length))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


# -------------------------------------------------------------------------------------------------------------- showing
def table(*names: str, numbers: tuple[str, ...]) -> Table:
    """An empty one, with columns of text and of numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.1f}" if part is not None and whole else "-"
