"""Token choice and expert choice: experts on their own tokens, the balance loss, and the choice that leaks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.expert_choice import ExpertChoice
from llmx.feedforward.moe import MixtureOfExperts
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.experts import SwiGLUExperts, grouped_product
from llmx.protocol import Context, Site
from tests.parity import context

VOCAB = 11
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def swiglu(experts: SwiGLUExperts, index: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ experts.gate_up[index]).chunk(2, -1)
    return (F.silu(gate) * up) @ experts.down[index]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(7, 4, 2), (1, 8, 3), (20, 3, 3)])
def test_experts_run_on_their_own_tokens_as_all_would_on_all(tokens: int, experts: int, top_k: int):
    torch.manual_seed(0)
    module = SwiGLUExperts(6, 5, experts, 1).double()
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    every = torch.stack([swiglu(module, i, x) for i in range(experts)], 1)  # (N, E, D)
    expected = (weights[..., None] * every.gather(1, chosen[..., None].expand(-1, -1, 6))).sum(1)
    outputs = module(x, chosen, weights)
    assert_close(outputs, expected, **SAME)
    leaves = [x, weights, *module.parameters()]
    direction = torch.randn_like(outputs)
    for ours, theirs in zip(
        torch.autograd.grad(outputs, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        assert_close(ours, theirs, **SAME)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_the_grouped_product_and_its_gradient_for_any_counts(counts: list[int]):
    rows = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(counts), 3, 2, dtype=torch.float64, requires_grad=True)
    number = torch.tensor(counts)
    expert = torch.arange(len(counts)).repeat_interleave(number)
    expected = torch.einsum("md,mdf->mf", rows, weights[expert])
    assert_close(grouped_product(rows, weights, number), expected, **SAME)
    assert torch.autograd.gradcheck(partial(grouped_product, counts=number), (rows, weights))


def test_the_grouped_product_is_a_well_formed_operator():
    arguments = (torch.randn(5, 3, requires_grad=True), torch.randn(3, 3, 2, requires_grad=True))
    torch.library.opcheck(grouped_product, (*arguments, torch.tensor([2, 0, 3])))


def network(balance: float) -> Decoder:
    torch.manual_seed(0)
    block = partial(
        PreNormBlock,
        mixer=partial(Attention, heads=2),
        feed_forward=partial(MixtureOfExperts, experts=4, top_k=2, hidden=4, balance=balance),
    )
    return Decoder(VOCAB, block, dim=8, depth=2).double()


def test_the_balance_loss_is_one_a_layer_in_balance_and_more_outside_of_it():
    module = MixtureOfExperts(Site(dim=4), experts=4, top_k=2, balance=1.0).train()
    with torch.no_grad():
        module.router.weight.copy_(torch.eye(4))
    x = torch.eye(4)[None] + 0.5 * torch.eye(4).roll(1, 1)[None]  # token i likes i and i + 1

    def auxiliary(x: torch.Tensor) -> float:
        one: Context = context(x)
        module(x, one)
        return one.auxiliary.item()

    assert auxiliary(x) == pytest.approx(1.0, abs=1e-6)
    assert auxiliary(x[:, :1].expand(1, 4, 4)) > 1.2


def test_the_balance_loss_is_for_training_and_not_part_of_any_loss_that_is_reported():
    tokens, targets = torch.randint(VOCAB, (2, 3, 9))
    with_, without = network(0.5), network(0.0)
    assert with_.eval().losses(tokens, targets)[1] == 0
    losses, auxiliary = with_.train().losses(tokens, targets)
    assert auxiliary > 0.9  # two layers, about 0.5 each
    assert torch.equal(losses, without.train().losses(tokens, targets)[0])


def test_the_balance_loss_survives_gradient_checkpointing():
    tokens, targets = torch.randint(VOCAB, (2, 3, 9))
    results = []
    for checkpointed in (False, True):
        one = network(0.5).train()
        if checkpointed:
            one.enable_gradient_checkpointing()
        losses, auxiliary = one.losses(tokens, targets)
        (losses.mean() + auxiliary).backward()
        results.append((auxiliary, *(parameter.grad for parameter in one.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, **SAME)


def test_a_token_of_token_choice_does_not_see_another():
    module = MixtureOfExperts(Site(dim=8), experts=4, top_k=2).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    alone = torch.stack([module(x[:, t : t + 1], context(x[:, t : t + 1]))[:, 0] for t in range(6)], 1)
    assert_close(module(x, context(x)), alone, **SAME)


@pytest.mark.parametrize(("capacity", "time"), [(2.0, 8), (1.0, 8), (0.5, 8), (3.0, 5)])
def test_expert_choice_gives_each_expert_its_best_tokens(capacity: float, time: int):
    torch.manual_seed(0)
    module = ExpertChoice(Site(dim=6), experts=4, capacity=capacity, hidden=3).double()
    x = torch.randn(2, time, 6, dtype=torch.float64)
    count = max(1, int(time * capacity / 4))
    expected = torch.zeros_like(x)
    for row in range(2):
        scores = (x[row] @ module.router.weight.T).softmax(-1)
        for expert in range(4):
            for t in scores[:, expert].topk(count).indices:
                expected[row, t] += scores[t, expert] * swiglu(module.experts, expert, x[row, t])
    assert_close(module(x, context(x)), expected, **SAME)


@pytest.mark.parametrize("kind", [MixtureOfExperts, ExpertChoice])
def test_a_hidden_width_of_nothing_is_named(kind: type):
    with pytest.raises(ValueError, match=r"^hidden: "):
        kind(Site(dim=8), hidden=0)


@pytest.mark.parametrize(
    ("arguments", "key"), [({"top_k": 1}, "top_k"), ({"top_k": 9}, "top_k"), ({"balance": -1.0}, "balance")]
)
def test_a_choice_that_teaches_the_router_nothing_is_named(arguments: dict[str, float], key: str):
    with pytest.raises(ValueError, match=f"^{key}: "):
        MixtureOfExperts(Site(dim=8), **arguments)


@pytest.mark.parametrize("capacity", [0.0, 8.5])
def test_a_capacity_that_cannot_be_is_named(capacity: float):
    with pytest.raises(ValueError, match=r"^capacity: "):
        ExpertChoice(Site(dim=8), capacity=capacity)
