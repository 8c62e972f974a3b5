"""Soft caps, windows and full attention in turn, norms on both sides, GeGLU and a scaled tied embedding: Gemma 2 of
transformers, on the same weights. Its norms multiply by 1 + weight, and its even layers have the window."""

from functools import partial

import pytest
from torch import nn

from llmx.blocks.cycle import Cycle
from llmx.blocks.sandwich import SandwichBlock
from llmx.feedforward.geglu import GeGLU
from llmx.mixers.soft_capped import SoftCappedAttention, SoftCappedWindowAttention
from llmx.networks.decoder import Decoder
from llmx.networks.embeddings import TokenEmbedding
from llmx.networks.heads import SoftCappedHead
from llmx.parts.norm import RMSNorm
from tests.parity import VOCAB, Named, assert_same_network, minus_one, projections, randomised, values

gemma2 = pytest.importorskip("transformers.models.gemma2")

CAP, HEAD_CAP, WINDOW = 1.5, 2.0, 3  # small, so that the caps bend what random weights give


def pair(dim: int, heads: int, kv_heads: int, depth: int) -> tuple[Decoder, nn.Module]:
    norm = partial(RMSNorm, eps=1e-6)
    shape = {"heads": heads, "kv_heads": kv_heads, "cap": CAP, "rotary_base": 500.0}
    mixers = (partial(SoftCappedWindowAttention, **shape, window=WINDOW), partial(SoftCappedAttention, **shape))
    blocks = [
        partial(SandwichBlock, mixer=mixer, feed_forward=partial(GeGLU, hidden=24), norm=norm) for mixer in mixers
    ]
    ours = randomised(
        Decoder(
            VOCAB,
            partial(Cycle, blocks=blocks),
            dim=dim,
            depth=depth,
            embedding=partial(TokenEmbedding, scale=dim**0.5),
            norm=norm,
            head=partial(SoftCappedHead, cap=HEAD_CAP),
            tied=True,
        )
    )
    theirs = gemma2.Gemma2ForCausalLM(
        gemma2.Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=24,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            query_pre_attn_scalar=dim // heads,
            sliding_window=WINDOW,
            attn_logit_softcapping=CAP,
            final_logit_softcapping=HEAD_CAP,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    ).eval()
    assert theirs.config.layer_types[:2] == ["sliding_attention", "full_attention"]
    theirs.load_state_dict(minus_one(as_gemma2(ours, values(ours))))
    return ours, theirs


def as_gemma2(network: Decoder, tensors: Named) -> Named:
    named = {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["embedding.table.weight"],
    }
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}.block", f"model.layers.{layer}"
        named |= projections(block, tensors, ours, theirs) | {
            f"{theirs}.input_layernorm.weight": tensors[f"{ours}.mixer_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": tensors[f"{ours}.mixer_out_norm.weight"],
            f"{theirs}.pre_feedforward_layernorm.weight": tensors[f"{ours}.feed_forward_norm.weight"],
            f"{theirs}.post_feedforward_layernorm.weight": tensors[f"{ours}.feed_forward_out_norm.weight"],
        }
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "depth", "batch", "time"),
    [(32, 8, 8, 2, 2, 7), (32, 8, 2, 2, 2, 11), (48, 4, 1, 4, 1, 13), (12, 3, 3, 2, 3, 1)],
)
def test_logits_steps_and_gradients_are_those_of_gemma2(dim, heads, kv_heads, depth, batch, time):
    assert_same_network(*pair(dim, heads, kv_heads, depth), as_gemma2, batch, time)
