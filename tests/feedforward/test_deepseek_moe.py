"""DeepSeek's experts against those of transformers, and the bias that keeps them in balance."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.deepseek_moe import DeepSeekMoE
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.protocol import Site
from tests.parity import CLOSE, Named, assert_same_gradients, context, randomised, values

VOCAB = 11


def as_deepseek(module: DeepSeekMoE, tensors: Named) -> Named:
    gate, up = tensors["shared_gate_up.weight"].chunk(2)
    return {
        "gate.weight": tensors["router.weight"],
        "experts.gate_up_proj": tensors["experts.gate_up"].transpose(1, 2),
        "experts.down_proj": tensors["experts.down"].transpose(1, 2),
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": tensors["shared_down.weight"],
    }


@pytest.mark.parametrize(
    ("dim", "experts", "top_k", "shared", "hidden", "batch", "time"),
    [(16, 8, 3, 1, 12, 2, 7), (16, 4, 2, 2, 9, 1, 13), (12, 2, 2, 1, 5, 3, 1)],
)
def test_outputs_and_gradients_are_those_of_deepseek_v3(dim, experts, top_k, shared, hidden, batch, time):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=dim,
        moe_intermediate_size=hidden,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_shared_experts=shared,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        experts_implementation="eager",
    )
    ours = randomised(DeepSeekMoE(Site(dim=dim), experts, top_k, shared, hidden))
    ours.bias.normal_()  # far more than any router's score: it decides who is chosen
    theirs = modeling.DeepseekV3MoE(config)
    theirs.load_state_dict(as_deepseek(ours, values(ours)) | {"gate.e_score_correction_bias": ours.bias})
    one = torch.randn(batch, time, dim, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    outputs, expected = ours(one, context(one)), theirs(two)
    assert_close(outputs, expected, **CLOSE)
    weights = torch.randn_like(outputs)
    (outputs * weights).sum(-1).mean().backward()
    (expected * weights).sum(-1).mean().backward()
    assert_close(one.grad, two.grad, **CLOSE)
    assert_same_gradients(ours, theirs, as_deepseek)


def favouring(first: int = 0) -> DeepSeekMoE:
    """Whose router sends every token of ones to expert `first` and the next."""
    module = DeepSeekMoE(Site(dim=8), experts=4, top_k=2, hidden=4)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[first : first + 2] = 1.0
    return module


def test_a_step_moves_the_bias_against_the_load_by_the_rate_alone():
    module, x = favouring(), torch.ones(1, 5, 8)
    module.train()(x, context(x))
    assert not module.bias.any()  # until the optimizer has stepped
    module.after_optimizer_step()
    assert_close(module.bias, torch.tensor([-1e-3, -1e-3, 1e-3, 1e-3]))
    module.after_optimizer_step()  # nothing has been counted since
    assert_close(module.bias, torch.tensor([-1e-3, -1e-3, 1e-3, 1e-3]))


def test_evaluation_counts_nothing():
    module, x = favouring(), torch.ones(1, 5, 8)
    module.eval()(x, context(x))
    module.after_optimizer_step()
    assert not module.bias.any()


def test_the_bias_brings_tokens_to_experts_that_had_few():
    torch.manual_seed(0)
    module = DeepSeekMoE(Site(dim=8), experts=4, top_k=2, hidden=4)
    x = torch.randn(4, 64, 8)
    with torch.no_grad():
        module.router.weight.normal_()
        x = x + module.router.weight[0]  # all like expert 0
    loads = []
    for _ in range(400):
        module.train()(x, context(x))
        loads.append(module.load.clone())
        module.after_optimizer_step()
    assert loads[0].max() > 1.5 * loads[0].float().mean()
    assert loads[-1].max() < 1.1 * loads[-1].float().mean()


def test_the_bias_is_in_a_checkpoint_and_has_no_gradient():
    module = favouring()
    assert "bias" in module.state_dict()
    assert "load" not in module.state_dict()
    assert "bias" not in dict(module.named_parameters())


def trained(checkpointed: bool, pieces: int) -> Decoder:
    """One step on four rows, in one micro-batch or in more."""
    torch.manual_seed(0)
    block = partial(
        PreNormBlock,
        mixer=partial(Attention, heads=2),
        feed_forward=partial(DeepSeekMoE, experts=4, top_k=2, hidden=4),
    )
    network = Decoder(VOCAB, block, dim=8, depth=2).double().train()
    if checkpointed:
        network.enable_gradient_checkpointing()
    text = torch.randint(VOCAB, (4, 10), generator=torch.Generator().manual_seed(1))
    for rows in text.chunk(pieces):
        (network.losses(rows[:, :-1], rows[:, 1:])[0].mean() / pieces).backward()
    network.after_optimizer_step()
    return network


@pytest.mark.parametrize(("checkpointed", "pieces"), [(True, 1), (False, 2), (False, 4), (True, 2)])
def test_accumulation_and_checkpointing_move_the_same_biases(checkpointed: bool, pieces: int):
    expected, network = trained(False, 1), trained(checkpointed, pieces)
    for name, value in expected.named_buffers():
        if name.endswith("bias"):
            assert value.any()
            assert torch.equal(dict(network.named_buffers())[name], value)
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)  # float64 rounding


def count_and_step(rank: int, path: str, tokens: list[int], biases: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    module = favouring(2 * rank)
    x = torch.ones(1, tokens[rank], 8)
    module.train()(x, context(x))
    module.after_optimizer_step()
    torch.save(module.bias, f"{biases}-{rank}")
    dist.barrier()  # who leaves first may take the other with it
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_add_their_loads_up(tmp_path, monkeypatch):
    """The first sends 3 tokens to experts 0 and 1, the second 9 to 2 and 3: together the latter have too many."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    arguments = (str(tmp_path / "meeting"), [3, 9], str(tmp_path / "bias"))
    torch.multiprocessing.spawn(count_and_step, arguments, nprocs=2)
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"bias-{rank}"), torch.tensor([1e-3, 1e-3, -1e-3, -1e-3]))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"shared": 0}, "shared"), ({"hidden": 0}, "hidden"), ({"top_k": 1}, "top_k"), ({"top_k": 17}, "top_k")],
)
def test_a_bad_argument_is_named(arguments: dict[str, int], key: str):
    with pytest.raises(ValueError, match=f"^{key}: "):
        DeepSeekMoE(Site(dim=8), **arguments)


def test_shared_experts_see_every_token():
    """With routed experts of zeros what is left is the SwiGLU of the shared ones."""
    module = randomised(DeepSeekMoE(Site(dim=8), experts=4, top_k=2, shared=2, hidden=3))
    nn.init.zeros_(module.experts.down)
    x = torch.randn(2, 5, 8)
    gate, up = module.shared_gate_up(x).chunk(2, -1)
    assert_close(module(x, context(x)), module.shared_down(nn.functional.silu(gate) * up))
