"""Retention against the paper's parallel form, with complex numbers for its rotation and all of its scales."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmx.mixers.retnet import Retention
from llmx.parts.norm import HeadNorm
from llmx.protocol import Site
from tests.parity import context, randomised

DIM, HEADS, TIME = 24, 3, 70


def mixer(eps: float = 1e-14) -> Retention:
    made = randomised(Retention(Site(dim=DIM), heads=HEADS)).double()
    made.norm.eps = eps
    return made


def test_outputs_are_those_of_the_parallel_form_with_its_three_scales():
    made = mixer()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    query, key, value, gate = made.project(x).split((DIM, DIM, 2 * DIM, 2 * DIM), -1)
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))

    positions = torch.arange(TIME, dtype=torch.float64)
    angles = positions[:, None] * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    query, key = (torch.complex(*part.chunk(2, -1)) * turn for part in (query, key))

    gamma = 1 - 2.0 ** -torch.arange(5, 5 + HEADS, dtype=torch.float64)
    lag = positions[:, None] - positions
    decay = torch.where(lag >= 0, gamma[:, None, None] ** lag, 0.0)
    decay = decay / decay.sum(-1, keepdim=True).sqrt()
    scores = (query @ key.conj().transpose(-1, -2)).real * decay
    scores = scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)
    mixed = F.layer_norm((scores @ value).transpose(1, 2), (2 * DIM // HEADS,), eps=1e-14).flatten(2)
    expected = made.out(F.silu(gate) * mixed * made.norm.weight)
    assert_close(made(x, context(x)), expected, rtol=1e-8, atol=1e-8)


def test_the_norm_never_sees_time():
    made = mixer()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    louder = x.clone()
    louder[:, -1] *= 100
    assert torch.equal(made(x, context(x))[:, :-1], made(louder, context(x))[:, :-1])


def test_the_norm_of_heads_is_a_group_norm_of_each_token_alone():
    norm = randomised(HeadNorm(HEADS, 5))
    x = torch.randn(2, 7, HEADS, 5)
    one_by_one = F.group_norm(x.flatten(0, 1).flatten(1), HEADS, norm.weight, eps=norm.eps)
    assert_close(norm(x).flatten(0, 1), one_by_one)
    over_time = F.group_norm(x.flatten(2).transpose(1, 2), HEADS, norm.weight, eps=norm.eps).transpose(1, 2)
    assert not torch.allclose(norm(x), over_time, atol=1e-2)


def test_the_memory_fades_by_the_decay_of_its_head():
    made = mixer()
    with torch.no_grad():
        made.project.weight.zero_()
    x = torch.randn(1, TIME, DIM, dtype=torch.float64)
    state = made.init_state(1, TIME)
    state = type(state)(torch.ones_like(state.memory))
    _, after = made.prefill(x, state, context(x))
    expected = (1 - 2.0 ** -torch.arange(5, 5 + HEADS, dtype=torch.float64)) ** TIME
    assert_close(after.memory[0, :, 0, 0], expected)
