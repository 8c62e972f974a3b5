"""Two layers of RG-LRU to one of local attention, a scaled tied embedding, a soft cap: RecurrentGemma of transformers,
on the same weights. Its norms multiply by 1 + weight."""

from functools import partial

import pytest
from torch import nn

from llmx.blocks.cycle import Cycle
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.geglu import GeGLU
from llmx.mixers.rg_lru import RGLRU
from llmx.mixers.sliding_window import SlidingWindowAttention
from llmx.networks.decoder import Decoder
from llmx.networks.embeddings import TokenEmbedding
from llmx.networks.heads import SoftCappedHead
from llmx.parts.norm import RMSNorm
from tests.mixers.test_rg_lru import as_gemma
from tests.parity import VOCAB, Named, assert_same_network, minus_one, randomised, values

gemma = pytest.importorskip("transformers.models.recurrent_gemma")

DIM, HEADS, HIDDEN, WINDOW, DEPTH, CAP = 16, 2, 24, 3, 3, 2.0  # the root of DIM is exact in bfloat16


def pair(kv_heads: int) -> tuple[Decoder, nn.Module]:
    norm = partial(RMSNorm, eps=1e-6)
    recurrent = partial(RGLRU, heads=HEADS)
    local = partial(SlidingWindowAttention, heads=HEADS, kv_heads=kv_heads, window=WINDOW, rotary_base=500.0)
    blocks = [
        partial(PreNormBlock, mixer=mixer, feed_forward=partial(GeGLU, hidden=HIDDEN), norm=norm)
        for mixer in (recurrent, recurrent, local)
    ]
    ours = randomised(
        Decoder(
            VOCAB,
            partial(Cycle, blocks=blocks),
            dim=DIM,
            depth=DEPTH,
            embedding=partial(TokenEmbedding, scale=DIM**0.5),
            norm=norm,
            head=partial(SoftCappedHead, cap=CAP),
            tied=True,
        )
    )
    theirs = gemma.RecurrentGemmaForCausalLM(
        gemma.RecurrentGemmaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            lru_width=DIM,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            head_dim=DIM // HEADS,
            attention_window_size=WINDOW,
            logits_soft_cap=CAP,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
            attn_implementation="eager",
            use_cache=False,
        )
    )
    for layer in theirs.model.layers:  # ours have no biases there
        for linear in (layer.mlp_block.gate_proj, layer.mlp_block.up_proj, layer.mlp_block.down_proj):
            linear.bias = None
    theirs.model.layers[2].temporal_block.o_proj.bias = None
    named = minus_one(as_recurrent_gemma(ours, values(ours)))
    theirs.load_state_dict(named | {"lm_head.weight": named["model.embed_tokens.weight"]})
    return ours, theirs


def as_recurrent_gemma(network: Decoder, tensors: Named) -> Named:
    named = {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.final_norm.weight": tensors["norm.weight"],
    }
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}.block", f"model.layers.{layer}"
        gate, up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"{theirs}.temporal_pre_norm.weight": tensors[f"{ours}.mixer_norm.weight"],
            f"{theirs}.channel_pre_norm.weight": tensors[f"{ours}.feed_forward_norm.weight"],
            f"{theirs}.mlp_block.gate_proj.weight": gate,
            f"{theirs}.mlp_block.up_proj.weight": up,
            f"{theirs}.mlp_block.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
        }
        start = f"{ours}.mixer."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        mixer = block.mixer
        if isinstance(mixer, RGLRU):
            renamed = as_gemma(mixer, own)
        else:
            widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
            query, key, value = own["qkv.weight"].split(widths)
            renamed = {"q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value}
            renamed["o_proj.weight"] = own["out.weight"]
        named |= {f"{theirs}.temporal_block.{name}": tensor for name, tensor in renamed.items()}
    return named


@pytest.mark.parametrize(("kv_heads", "batch", "time"), [(1, 2, 11), (2, 1, 1)])
def test_logits_and_gradients_are_those_of_recurrent_gemma(kv_heads, batch, time):
    ours, theirs = pair(kv_heads)
    assert_same_network(ours, theirs, as_recurrent_gemma, batch, time)
