"""Holds ours equal to another implementation with the same weights: outputs, steps and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.protocol import Context

VOCAB = 17
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 rounding

Named = dict[str, Tensor]
Rename = Callable[[Any, Named], Named]  # our parameters or gradients under the other implementation's names


def randomised(module: Any, std: float = 0.25) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def values(module: nn.Module) -> Named:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def minus_one(named: Named) -> Named:
    """For norms that multiply by 1 + weight."""
    return {name: tensor - 1 if "norm" in name else tensor for name, tensor in named.items()}


def projections(block: Any, tensors: Named, ours: str, theirs: str) -> Named:
    """The matrices of attention and of a gated feed-forward, under transformers' names."""
    return attention(block.mixer, tensors, ours, theirs) | feed_forward(tensors, ours, theirs)


def attention(mixer: Any, tensors: Named, ours: str, theirs: str) -> Named:
    widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    query, key, value = tensors[f"{ours}.mixer.qkv.weight"].split(widths)
    return {
        f"{theirs}.self_attn.q_proj.weight": query,
        f"{theirs}.self_attn.k_proj.weight": key,
        f"{theirs}.self_attn.v_proj.weight": value,
        f"{theirs}.self_attn.o_proj.weight": tensors[f"{ours}.mixer.out.weight"],
    }


def feed_forward(tensors: Named, ours: str, theirs: str) -> Named:
    """A gated one."""
    gate, up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
    return {
        f"{theirs}.mlp.gate_proj.weight": gate,
        f"{theirs}.mlp.up_proj.weight": up,
        f"{theirs}.mlp.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
    }


def ends(tensors: Named) -> Named:
    """The embedding, the last norm and the head."""
    return {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["head.linear.weight"],
    }


def norms(tensors: Named, ours: str, theirs: str) -> Named:
    """The norms of a pre-norm block."""
    return {
        f"{theirs}.input_layernorm.weight": tensors[f"{ours}.mixer_norm.weight"],
        f"{theirs}.post_attention_layernorm.weight": tensors[f"{ours}.feed_forward_norm.weight"],
    }


def named_as_llama(network: Any, tensors: Named) -> Named:
    """The tensors of a decoder of pre-norm blocks, under the names of a Llama."""
    named = ends(tensors)
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        named |= projections(block, tensors, ours, theirs) | norms(tensors, ours, theirs)
    return named


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, rename: Rename) -> None:
    gradients = rename(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert_close(gradients[name], parameter.grad, **CLOSE, msg=lambda message, name=name: f"{name}: {message}")


def assert_same_network(ours: Any, theirs: Any, rename: Rename, batch: int, time: int) -> None:
    """Compares the logits of `forward`, `step` and a `prefill` in two pieces, and the gradients of the loss."""
    text = torch.randint(1, VOCAB, (batch, time + 1))
    tokens, targets = text[:, :-1], text[:, 1:]
    expected = theirs(input_ids=tokens).logits
    assert_close(ours(tokens), expected, **CLOSE)
    with torch.no_grad():
        state, logits = ours.init_state(batch, time), []
        for t in range(time):
            one, state = ours.step(tokens[:, t], state)
            logits.append(one)
        assert_close(torch.stack(logits, 1), expected, **CLOSE)
        if time > 1:
            first, state = ours.prefill(tokens[:, : time // 2], ours.init_state(batch, time))
            second, _ = ours.prefill(tokens[:, time // 2 :], state)
            assert_close(torch.cat((first, second), 1), expected, **CLOSE)

    ours.losses(tokens, targets)[0].mean().backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    assert_same_gradients(ours, theirs, rename)


def context(x: Tensor) -> Context:
    """The context of a single mixer that reads x (B, T, D)."""
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def assert_same_mixer(
    ours: Any, theirs: nn.Module, run: Callable[[Tensor], Tensor], rename: Rename, batch: int, time: int, dim: int
) -> None:
    """Compares outputs of `forward` and `step`, and gradients of input and parameters. `run` calls theirs."""
    x, weights = torch.randn(2, batch, time, dim)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    mixed, expected = ours(one, context(x)), run(two)
    assert_close(mixed, expected, **CLOSE)
    with torch.no_grad():
        state, outputs = ours.init_state(batch, time), []
        for t in range(time):
            output, state = ours.step(x[:, t], state, context(x).at(t))
            outputs.append(output)
        assert_close(torch.stack(outputs, 1), expected, **CLOSE)

    (mixed * weights).sum(-1).mean().backward()  # a mean over positions, like a loss: the tolerance is for this scale
    (expected * weights).sum(-1).mean().backward()
    assert_close(one.grad, two.grad, **CLOSE)
    assert_same_gradients(ours, theirs, rename)


def hidden_future(time: int, window: int | None = None) -> Tensor:
    """A mask (1, 1, T, T): 0 where a position sees another, the lowest number elsewhere."""
    lag = torch.arange(time)[:, None] - torch.arange(time)
    hidden = (lag < 0) | (lag >= (time if window is None else window))
    return torch.zeros(1, 1, time, time).masked_fill(hidden, torch.finfo(torch.float32).min)
