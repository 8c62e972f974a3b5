"""What the losses of a network depend on that fails the blind pass, and which of its modules is the first to do so.

The batch with the loss that changed most is scored again in the run's own form, with one thing changed at a time: none,
the text after the cut, the other rows, their order, the batches before. Then hooks record every module in two passes.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmx.audits.blind import Blind, Change, Seen
from llmx.audits.causality_cases import (
    Calls,
    ModuleCall,
    Part,
    first_leaking_module,
    record_calls,
    row_parts,
    time_parts,
)
from llmx.audits.network_copies import copy_network, preserve_rng_state, seed_cpu
from llmx.audits.score import Score
from llmx.protocol import Logits, Network, Tokens

TOLERANCES = (1e-2, 1e-4, 1e-6, 0.0)  # relative: a module that changes much is named before one that rounds
LEAST = 1e-3  # of the largest change: a smaller one does not explain it
WARM = 4  # calls after which a memory of the last batch, layer upon layer, holds this batch alone
AGAIN = "two identical calls in evaluation mode differ"
CALLS = "its losses depend on how often it was called"


class Location(NamedTuple):
    verdict: str  # "LEAKING" or "RANDOM"
    what: str  # a sentence
    culprit: ModuleCall | None  # the first module that does it; None if none of them does

    @property
    def module(self) -> str:
        """Its dotted name (the network's class for the network itself) and its class; nothing for none."""
        if self.culprit is None:
            return ""
        return f"{self.culprit.module or self.culprit.module_class} ({self.culprit.module_class})"

    def __str__(self) -> str:
        return self.what + (f"; the first module that does so is {self.module}" if self.module else "")


class Trial(NamedTuple):
    """A batch that gives one row another loss than `batch` does."""

    what: str
    batch: Tokens  # (B, T)
    row: int  # where the row stands in it
    part: Part  # what must not change in the tensors of the first pass
    part2: Part  # and of this one


def locate(score: Score, seen: Seen, blind: Blind, changed: Change, batch_size: int, device: Any) -> Location:
    """Tells why the loss that changed most has changed. The network stays as it is but for what calls do to it."""
    sizes = changed.losses.abs().nan_to_num(nan=torch.inf)
    worst = int(sizes.amax(1).argmax())
    number, cut = int(blind.rows[worst]), int(blind.cuts[worst])
    least = LEAST * sizes[worst].max().item()
    start = number // batch_size * batch_size
    own, targets = (tensor[start : start + batch_size] for tensor in (seen.inputs, seen.targets))
    row = number - start
    answers = targets.to(device)
    culprit = partial(_culprit, score, device=device)

    def losses(batch: Tokens, at: int = row, seed: int = 0) -> Tensor:
        seed_cpu(seed)
        order = torch.arange(len(batch)).roll(at - row)
        return score(batch.to(device), answers[order])[at, :cut].double().cpu()

    def warm_up() -> None:
        for _ in range(WARM):
            losses(own)

    with preserve_rng_state(eager=not score.compiled):
        warm_up()
        first, again, drawn = losses(own), losses(own), losses(own, seed=1)

        def differs(second: Tensor) -> bool:
            return bool(((first - second).abs().nan_to_num(nan=torch.inf) > least).any())

        if differs(again):
            return Location("LEAKING", CALLS, culprit(Call(own), Call(own, before=own), _all, _all))
        if differs(drawn):
            return Location("RANDOM", AGAIN, culprit(Call(own), Call(own, seed=1), _all, _all))
        for trial in _trials(seen, blind, own, worst, row, cut):
            if differs(losses(trial.batch, trial.row)):
                found = culprit(Call(own), Call(trial.batch), trial.part, trial.part2)
                return Location("LEAKING", f"its losses depend on {trial.what}", found)
            warm_up()
        found = culprit(Call(own, before=own), Call(own, before=own.flip(1)), _all, _all)
    return Location("LEAKING", "its losses depend on earlier batches", found)


def _trials(seen: Seen, blind: Blind, own: Tokens, worst: int, row: int, cut: int) -> Iterator[Trial]:
    rows, length = own.shape
    later = own.clone()
    later[row] = blind.inputs[worst]
    time = partial(time_parts, rows=rows, length=length, keep=cut)
    yield Trial("later text", later, row, time, time)
    count = len(seen.inputs)
    others = seen.inputs[(torch.arange(rows) + int(blind.rows[worst]) - row + count // 2) % count]
    others[row] = own[row]
    here = partial(row_parts, rows=rows, keep=[row])
    yield Trial("other rows of the batch", others, row, here, here)
    at = (row + rows // 2) % rows
    there = partial(row_parts, rows=rows, keep=[at])
    yield Trial("the order of the rows", own.roll(at - row, 0), at, here, there)


class Call(NamedTuple):
    """What a copy of the network reads, after another batch and with a seed."""

    batch: Tokens
    before: Tokens | None = None
    seed: int = 0


def _all(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _culprit(score: Score, one: Call, two: Call, part: Part, part2: Part, device: Any) -> ModuleCall | None:
    """The first module whose output differs between two calls although its inputs agree."""

    def record(call: Call, calls: Calls) -> Logits:
        network: Network = copy_network(score.network, share_parameters=True)
        if call.before is not None:
            network(call.before.to(device))
        record_calls(network, calls)
        seed_cpu(call.seed)
        return Score(network, score.compiled).forward(call.batch.to(device))

    first, second = partial(record, one), partial(record, two)
    for tolerance in TOLERANCES:
        try:
            culprit = first_leaking_module(first, second, part, part2, tolerance)
        except Exception:  # a compiler that cannot trace the hooks
            return None
        if culprit is not None:
            return culprit._replace(inputs=[], outputs=[])  # other processes get it
    return None
