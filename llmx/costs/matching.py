"""Changes a config to cost as much as another, for fair comparisons: `describe --match {parameters,flops} --to CONFIG`.

    parameters    solves for a size of the network: the hidden width of the feed-forwards, else `dim`, or `--by`
    flops         of the whole training: solves for the number of steps; with `--by` for a size, at equal FLOPs a token

Sizes that vary together keep their ratio: the search solves for the largest and rounds the others. It is a bisection,
so costs have to rise with the size. The trap: not every size can be built (heads have to divide a width). The search
steps over those that cannot.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmx.config.paths import entries, set_at
from llmx.costs.from_config import build_without_memory, describe_config
from llmx.errors import UserError
from llmx.parts.parameter_count import count_parameters

MATCHED = 0.05  # costs that differ by at most this share count as equal
STEPS = "trainer.max_steps"
DEFAULTS = ("feed_forward.hidden", "dim")  # the first that the network has
PATIENCE = 512  # sizes in a row that cannot be built before the search ends


def relative_gap(costs: Iterable[float | None]) -> float:
    """By which share the largest exceeds the smallest, without costs that are zero or unknown."""
    known = [cost for cost in costs if cost]
    return max(known) / min(known) - 1 if known else 0.0


@dataclass(frozen=True)
class Match:
    """The nearest config that the search found."""

    changes: dict[str, Any]  # overrides the config, nested like it
    kind: str  # the matched cost, in words
    own: float  # its amount in the changed config
    other: float  # its amount in the other config

    @property
    def holds(self) -> bool:
        return relative_gap((self.own, self.other)) <= MATCHED

    def said(self, name: str) -> str:
        """The result in one line; `name` is that of the other config."""
        percent = round(100 * (self.own / self.other - 1), 2) + 0.0  # no -0.00
        return f"{self.kind}: {self.own:,.0f}, and {self.other:,.0f} in {name} ({percent:+.2f} %)"


def match(own: dict[str, Any], other: dict[str, Any], what: str, by: str | None, vocab_size: int) -> Match:
    """Solves for the change that makes a config cost as much as another.

    Both are plain data: `model`, `data`, `trainer`, and `length` to count FLOPs. The cost is `parameters` or `flops`.
    The size to vary, `by`, is a key of the network, or the end of one or several keys. Raises UserError for sizes that
    do not exist or do not serve, and if there is nothing to match.
    """

    def cost(settings: dict[str, Any], network: Any) -> float:
        value: float | None
        if what == "parameters":
            built = build_without_memory(network, vocab_size)
            name, value, why = type(built).__name__, count_parameters(built), None
        else:
            found = describe_config(network, vocab_size, settings["length"])
            name, value, why = found.network, found.training_flops_per_token, found.uncounted
        if value:
            return value
        raise UserError(f"model.network: {name} cannot be matched by {what}, {why or 'there are none'}")

    network = own["model"]["network"]
    held = cost(own, network)
    try:
        goal = cost(other, other["model"]["network"])
    except ValueError as error:
        raise UserError(f"to: {error}") from error
    if what == "flops" and by in (None, STEPS):
        if other["trainer"]["max_steps"] < 1:
            raise UserError(f"to: gives no {STEPS}, whose training FLOPs could be matched")
        tokens, others = (side["data"]["batch_size"] * side["data"]["window"] for side in (own, other))
        a_step, goal = held * tokens, goal * others * other["trainer"]["max_steps"]
        steps = max(1, round(goal / a_step))
        return Match({"trainer": {"max_steps": steps}}, "training FLOPs", steps * a_step, goal)
    sizes = _sizes(network, by)
    largest = max(sizes.values())

    def resized(size: int) -> Any:
        config = {"model": {"network": copy.deepcopy(network)}}
        for key, given in sizes.items():
            set_at(config, key, str(max(min(1, size), round(size * given / largest))))
        return config["model"]["network"]

    def attempt(size: int) -> float | None:
        try:
            return cost(own, resized(size))
        except ValueError:
            return None

    try:
        size, reached = nearest(attempt, goal)
    except ValueError as error:
        raise UserError(f"by: {', '.join(sizes)}: {error}") from error
    changes = {"model": {"network": _difference(resized(0), resized(size))}}
    return Match(changes, what if what == "parameters" else "training FLOPs a token", reached, goal)


def nearest(cost: Callable[[int], float | None], goal: float) -> tuple[int, float]:
    """The whole number from 1 on whose cost is nearest to the goal, and that cost.

    A number may have no cost, None. Raises ValueError if no number has one, or the cost does not rise.
    """
    tried: dict[int, float] = {}

    def first(start: int, stop: int) -> int | None:
        for n in range(start, stop):
            if (found := cost(n)) is not None:
                tried[n] = found
                return n
        return None

    low = first(1, 1 + PATIENCE)
    if low is None:
        raise ValueError(f"none of 1 to {PATIENCE} can be built")
    while (n := first(2 * low, 2 * low + PATIENCE)) is not None:
        if tried[n] <= tried[low]:
            raise ValueError(f"{n} costs no more than {low}, so there is nothing to solve for")
        if tried[n] >= goal:
            break
        low = n
    high = 2 * low  # every number from here on costs the goal or more
    while high - low > 1:
        middle = (low + high) // 2
        n = first(middle, high)
        if n is not None and tried[n] < goal:
            low = n
        else:
            high = middle
    return min(tried.items(), key=lambda pair: abs(pair[1] - goal))


def _sizes(network: Any, by: str | None) -> dict[str, int]:
    """The sizes to vary, by key; a size that is null counts as large as the largest given one."""
    ends = DEFAULTS if by is None else (by.replace("init_args.", ""),)
    keys = entries(network, "model.network")
    matching = ({key: value for key, value in keys if f".{key}".endswith(f".{end}")} for end in ends)
    found = next(filter(None, matching), None)
    if found is None:
        raise UserError(f"by: model.network has no key that ends with {' or '.join(ends)}")
    for key, value in found.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"by: {key} is no size, a whole number from 1 on, but {value!r:.60}")
    largest = max((value for value in found.values() if value), default=1)
    return {key: value or largest for key, value in found.items()}


def _difference(before: Any, after: Any) -> Any:
    """The changed values with their class paths. Lists keep all entries: the parser merges them one by one."""
    if isinstance(after, list):
        return [_difference(*pair) for pair in zip(before, after, strict=True)]
    if not isinstance(after, dict):
        return after
    changed = {key: _difference(before[key], value) for key, value in after.items() if value != before[key]}
    return {"class_path": after["class_path"], **changed} if "class_path" in after else changed
