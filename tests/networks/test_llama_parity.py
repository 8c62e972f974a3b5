"""The decoder against the Llama of transformers, on the same random weights."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm

llama = pytest.importorskip("transformers.models.llama")

VOCAB = 17
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 rounding; transformers computes its norms another way
SHAPES = [  # dim, heads, kv_heads, hidden, depth, batch, time
    (32, 8, 8, 24, 2, 2, 7),
    (32, 8, 2, 24, 2, 2, 11),
    (48, 8, 1, 31, 3, 1, 13),
    (12, 3, 3, 5, 1, 3, 1),
]


def pair(dim: int, heads: int, kv_heads: int, hidden: int, depth: int) -> tuple[Decoder, nn.Module]:
    torch.manual_seed(0)
    norm = partial(RMSNorm, eps=1e-6)
    block = partial(
        PreNormBlock,
        mixer=partial(Attention, heads=heads, kv_heads=kv_heads, rotary_base=500.0),
        feed_forward=partial(SwiGLU, hidden=hidden),
        norm=norm,
    )
    ours = Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.25)
    theirs = llama.LlamaForCausalLM(
        llama.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
            tie_word_embeddings=False,
        )
    )
    theirs.load_state_dict(as_llama(ours, {name: tensor.detach() for name, tensor in ours.named_parameters()}))
    return ours, theirs


def as_llama(network: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under the names that transformers gives them."""
    named = {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["head.linear.weight"],
    }
    for layer, block in enumerate(network.layers):
        mixer = block.mixer
        widths = [mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim]
        query, key, value = tensors[f"blocks.{layer}.mixer.qkv.weight"].split(widths)
        gate, up = tensors[f"blocks.{layer}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": value,
                "self_attn.o_proj": tensors[f"blocks.{layer}.mixer.out.weight"],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": tensors[f"blocks.{layer}.feed_forward.down.weight"],
                "input_layernorm": tensors[f"blocks.{layer}.mixer_norm.weight"],
                "post_attention_layernorm": tensors[f"blocks.{layer}.feed_forward_norm.weight"],
            }.items()
        }
    return named


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "hidden", "depth", "batch", "time"), SHAPES)
def test_logits_and_gradients_are_those_of_llama(
    dim: int, heads: int, kv_heads: int, hidden: int, depth: int, batch: int, time: int
):
    ours, theirs = pair(dim, heads, kv_heads, hidden, depth)
    text = torch.randint(VOCAB, (batch, time + 1))
    tokens, targets = text[:, :-1], text[:, 1:]
    expected = theirs(input_ids=tokens).logits
    assert_close(ours(tokens), expected, **CLOSE)

    ours.losses(tokens, targets)[0].mean().backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    gradients = as_llama(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert_close(gradients[name], parameter.grad, **CLOSE, msg=lambda message, name=name: f"{name}: {message}")


def test_step_gives_the_logits_of_llama():
    ours, theirs = pair(32, 8, 2, 24, 2)
    text = torch.randint(VOCAB, (2, 6))
    state, logits = ours.init_state(2, 6), []
    for t in range(6):
        one, state = ours.step(text[:, t], state)
        logits.append(one)
    assert_close(torch.stack(logits, 1), theirs(input_ids=text).logits, **CLOSE)
