"""Checks for mixers that train a memory in mini-batches counted from the start of the text."""

from typing import Any

import torch
from torch.testing import assert_close

from llmx.protocol import Context
from tests.parity import context

SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


@torch.no_grad()
def assert_a_token_reads_up_to_its_own(mixer: Any, dim: int, time: int, places: tuple[int, ...]) -> None:
    """In a text of one mini-batch, a change at a place affects the outputs from that place on, and none before."""
    x = torch.randn(1, time, dim, dtype=torch.float64)
    outputs = mixer(x, context(x))
    for t in places:
        other = x.clone()
        other[:, t] += 1.0
        difference = (mixer(other, context(x)) - outputs).abs().amax((0, 2))
        assert difference[:t].max() == 0.0  # the rest of the mini-batch does not change
        assert difference[t:].min() > 1e-6
    mixer.project.weight[2 * dim : 3 * dim] += 1.0  # the value enters only the gradient, which the first token reads
    assert (mixer(x, context(x)) - outputs)[:, 0].abs().max() > 1e-6


@torch.no_grad()
def assert_rows_stand_where_they_like(mixer: Any, dim: int, starts: tuple[int, ...], time: int) -> None:
    """Rows whose texts began at different times continue together as each would alone."""
    texts = [torch.randn(1, start + time, dim, dtype=torch.float64) for start in starts]
    whole = [mixer.prefill(x, mixer.init_state(1, 0), context(x)) for x in texts]
    before = [mixer.prefill(x[:, :-time], mixer.init_state(1, 0), context(x[:, :-time]))[1] for x in texts]
    state = type(before[0])(*(torch.cat(parts) for parts in zip(*before, strict=True)))
    x = torch.cat([x[:, -time:] for x in texts])
    positions = torch.tensor(starts)[:, None] + torch.arange(time)
    here = Context(torch.zeros_like(positions), positions, x)
    outputs, after = mixer.prefill(x, state, here)
    assert_close(outputs, torch.cat([y[:, -time:] for y, _ in whole]), **SAME)
    for part, expected in zip(after, zip(*(last for _, last in whole), strict=True), strict=True):
        assert_close(part, torch.cat(expected), **SAME)
    assert_close(mixer.step(x[:, 0], state, here.at(0))[0], outputs[:, 0], **SAME)
