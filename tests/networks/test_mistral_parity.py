"""Attention over a window against Mistral of transformers, on the same weights, at lengths beyond the window.

Its window counts the query's own position, as ours does: a window of 1 sees nothing but itself.
"""

from functools import partial

import pytest
from torch import nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.sliding_window import SlidingWindowAttention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from tests.parity import VOCAB, assert_same_network, named_as_llama, randomised, values

mistral = pytest.importorskip("transformers.models.mistral")


def pair(dim: int, heads: int, kv_heads: int, window: int, depth: int) -> tuple[Decoder, nn.Module]:
    norm = partial(RMSNorm, eps=1e-6)
    block = partial(
        PreNormBlock,
        mixer=partial(SlidingWindowAttention, heads=heads, kv_heads=kv_heads, window=window, rotary_base=500.0),
        feed_forward=partial(SwiGLU, hidden=24),
        norm=norm,
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm))
    theirs = mistral.MistralForCausalLM(
        mistral.MistralConfig(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=24,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            sliding_window=window,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(named_as_llama(ours, values(ours)))
    return ours, theirs


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "window", "depth", "batch", "time"),
    [
        (32, 8, 8, 3, 2, 2, 7),
        (32, 8, 2, 3, 2, 2, 11),
        (32, 4, 1, 3, 2, 1, 2),
        (12, 3, 3, 1, 1, 2, 5),
        (32, 4, 2, 5, 1, 1, 17),
        (32, 4, 2, 9, 1, 1, 9),
        (32, 4, 2, 8, 1, 1, 9),
    ],
)
def test_logits_steps_and_gradients_are_those_of_mistral(dim, heads, kv_heads, window, depth, batch, time):
    assert_same_network(*pair(dim, heads, kv_heads, window, depth), named_as_llama, batch, time)
