"""mLSTM without its stabiliser, in float64, is the oracle; the whole network is held to xLSTM of transformers."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.mlstm import EPS, MLSTM, MLSTMState, mlstm
from llmx.networks.decoder import Decoder
from llmx.networks.heads import SoftCappedHead
from llmx.parts.norm import RMSNorm
from llmx.protocol import Site
from tests.parity import VOCAB, Named, assert_same_network, context, randomised, values

SAME = {"rtol": 1e-10, "atol": 1e-10}


def inputs(time: int, batch: int = 2, heads: int = 3, width: int = 4, value_width: int = 5) -> list[Tensor]:
    """Query, key, value, i, log sigmoid(f)."""
    generator = torch.Generator().manual_seed(time)
    query, key, value, input_gate, forget = (
        torch.randn(batch, time, heads, *size, generator=generator, dtype=torch.float64)
        for size in ((width,), (width,), (value_width,), (), ())
    )
    return [query, key, value, 2 * input_gate, nn.functional.logsigmoid(forget + 2)]


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, log_forget: Tensor, state: MLSTMState
) -> tuple[Tensor, MLSTMState]:
    """The paper's equations, one token after the other, with m a constant to the gradient."""
    memory, normalizer, top = state
    outputs = []
    for t in range(value.shape[1]):
        new = torch.maximum(log_forget[:, t] + top, input_gate[:, t]).detach()
        keep, write = (log_forget[:, t] + top - new).exp(), (input_gate[:, t] - new).exp()
        top = new
        memory = keep[..., None, None] * memory + write[..., None, None] * torch.einsum(
            "bhk,bhv->bhkv", key[:, t], value[:, t]
        )
        normalizer = keep[..., None] * normalizer + write[..., None] * key[:, t]
        weight = torch.maximum((normalizer * query[:, t]).sum(-1).abs(), (-top).exp()) + EPS
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], memory) / weight[..., None])
    return torch.stack(outputs, 1), MLSTMState(memory, normalizer, top)


def some_state(like: Tensor, value_width: int) -> MLSTMState:
    batch, _, heads, width = like.shape
    generator = torch.Generator().manual_seed(9)
    memory, normalizer, top = (
        torch.randn(batch, heads, *size, generator=generator, dtype=like.dtype)
        for size in ((width, value_width), (width,), ())
    )
    return MLSTMState(memory, normalizer, 3 * top)


@pytest.mark.parametrize("time", [1, 2, 5, 16, 33, 70])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_are_the_recurrence_in_outputs_state_and_gradients(chunk, time):
    tensors = [x.requires_grad_() for x in inputs(time)]
    memory, normalizer, top = some_state(tensors[0], 5)
    leaves = [*tensors, memory.requires_grad_(), normalizer.requires_grad_()]
    results = []
    for run in (recurrence, partial(mlstm, chunk=chunk)):
        output, after = run(*tensors, MLSTMState(memory, normalizer, top))
        loss = (output * output.detach().cos()).sum() + (after.memory * after.memory.detach().sin()).sum()
        results.append((output, tuple(after), torch.autograd.grad(loss, leaves)))
    assert_close(results[1], results[0], **SAME)


@pytest.mark.parametrize("shift", [-8.0, 0.0, 20.0])
def test_outputs_are_those_without_a_stabilizer(shift):
    query, key, value, input_gate, log_forget = inputs(40)
    input_gate = input_gate + shift
    sums = log_forget.cumsum(1).transpose(1, 2)
    weights = (sums[..., :, None] - sums[..., None, :] + input_gate.transpose(1, 2)[..., None, :]).exp().tril()
    scores = torch.einsum("bthk,bshk->bhts", query, key) * weights
    expected = scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)
    expected = torch.einsum("bhts,bshv->bthv", expected, value)
    found, _ = mlstm(query, key, value, input_gate, log_forget, chunk=16)
    # the constant in the normaliser is at most EPS of the largest weight
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_shift_of_all_input_gates_cancels_while_the_normaliser_is_active():
    query, key, value, input_gate, log_forget = inputs(40)
    low, low_state = mlstm(query, key, value, input_gate + 40, log_forget, chunk=16)
    high, high_state = mlstm(query, key, value, input_gate + 90, log_forget, chunk=16)
    assert_close(high, low, **SAME)
    assert_close(high_state.stabilizer, low_state.stabilizer + 50, **SAME)
    assert_close(high_state[:2], low_state[:2], **SAME)


def test_a_shift_of_the_bias_cancels_in_step_and_forward():
    mixer = randomised(MLSTM(Site(dim=12), heads=3, gate_cap=1e6)).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)

    def stepped() -> Tensor:
        state, outputs = mixer.init_state(2, 9), []
        for t in range(9):
            output, state = mixer.step(x[:, t], state, context(x).at(t))
            outputs.append(output)
        return torch.stack(outputs, 1)

    results = []
    for _ in range(2):
        with torch.no_grad():
            mixer.gates.bias[:3] += 50
        results.append((mixer(x, context(x)), stepped()))
    for one, two in zip(results[0], results[1], strict=True):
        assert_close(two, one, rtol=1e-6, atol=1e-8)


def test_a_closed_input_gate_writes_nothing():
    query, key, value, input_gate, log_forget = inputs(40)
    found, _ = mlstm(query, key, value, input_gate - 300, log_forget, chunk=16)
    assert found.abs().max() < 1e-100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates_over_a_long_sequence_stay_finite(dtype):
    query, key, value, input_gate, log_forget = inputs(4096, batch=1, heads=2)
    input_gate = 40 * input_gate  # exponentials of up to e^300
    log_forget[:, ::100] = -50.0
    rounded = [x.to(dtype).requires_grad_() for x in (query, key, value)] + [input_gate.float(), log_forget.float()]
    output, state = mlstm(*rounded)
    assert output.dtype == dtype
    assert all(part.isfinite().all() for part in (output, *state))
    exact, _ = mlstm(*(x.detach().double() for x in rounded))
    # a denominator may nearly vanish, there any rounding shows: most outputs, not all
    error = ((output.detach().double() - exact).abs() / (1e-3 + exact.abs())).flatten()
    assert error.median() < (1e-4 if dtype == torch.float32 else 4e-3)
    for gradient in torch.autograd.grad(output.float().sum(), rounded[:3]):
        assert gradient.isfinite().all()


def test_the_gates_start_where_the_paper_has_them():
    mixer = MLSTM(Site(dim=12), heads=3)
    assert_close(mixer.gates.bias[3:], torch.tensor([3, 4.5, 6]))
    assert not mixer.gates.weight.any()


def rename(network: Decoder, tensors: Named) -> Named:
    named = {
        "backbone.embeddings.weight": tensors["embedding.table.weight"],
        "backbone.out_norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["head.linear.weight"],
    }
    for layer, block in enumerate(network.layers):
        ours, dim = f"blocks.{layer}", block.mixer.dim
        query, key, value, gate = tensors[f"{ours}.mixer.project.weight"].split((dim // 2, dim // 2, dim, dim))
        input_weight, forget_weight = tensors[f"{ours}.mixer.gates.weight"].chunk(2)
        input_bias, forget_bias = tensors[f"{ours}.mixer.gates.bias"].chunk(2)
        up_gate, up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"backbone.blocks.{layer}.{name}": tensor
            for name, tensor in {
                "norm_mlstm.weight": tensors[f"{ours}.mixer_norm.weight"],
                "mlstm_layer.q.weight": query,
                "mlstm_layer.k.weight": key,
                "mlstm_layer.v.weight": value,
                "mlstm_layer.ogate_preact.weight": gate,
                "mlstm_layer.igate_preact.weight": input_weight,
                "mlstm_layer.igate_preact.bias": input_bias,
                "mlstm_layer.fgate_preact.weight": forget_weight,
                "mlstm_layer.fgate_preact.bias": forget_bias,
                "mlstm_layer.multihead_norm.weight": tensors[f"{ours}.mixer.norm.weight"],
                "mlstm_layer.out_proj.weight": tensors[f"{ours}.mixer.out.weight"],
                "norm_ffn.weight": tensors[f"{ours}.feed_forward_norm.weight"],
                "ffn.proj_up_gate.weight": up_gate,
                "ffn.proj_up.weight": up,
                "ffn.proj_down.weight": tensors[f"{ours}.feed_forward.down.weight"],
            }.items()
        }
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "depth", "batch", "time"),
    [(32, 4, 2, 2, 7), (32, 2, 2, 2, 37), (24, 3, 3, 1, 13), (8, 1, 1, 3, 1)],
)
def test_logits_and_gradients_are_those_of_xlstm(dim: int, heads: int, depth: int, batch: int, time: int):
    xlstm = pytest.importorskip("transformers.models.xlstm")
    norm = partial(RMSNorm, eps=1e-6)
    block = partial(
        PreNormBlock,
        mixer=partial(MLSTM, heads=heads, gate_cap=1.5),
        feed_forward=partial(SwiGLU, hidden=3 * dim // 2),
        norm=norm,
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm, head=partial(SoftCappedHead, cap=2.0)))
    theirs = xlstm.xLSTMForCausalLM(
        xlstm.xLSTMConfig(
            vocab_size=VOCAB,
            hidden_size=dim,
            embedding_dim=dim,
            num_hidden_layers=depth,
            num_blocks=depth,
            num_heads=heads,
            ffn_proj_factor=1.5,
            ffn_round_up_to_multiple_of=1,
            gate_soft_cap=1.5,
            output_logit_soft_cap=2.0,
            chunk_size=16,
            autocast_kernel_dtype="float32",
            use_cache=False,
        )
    ).eval()
    theirs.load_state_dict(rename(ours, values(ours)))
    assert_same_network(ours, theirs, rename, batch, time)
