"""Lightning attention against MiniMax of transformers, on the same weights."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.mixers.lightning import LightningAttention
from llmx.protocol import Site
from tests.parity import Named, assert_same_mixer, context, randomised, values

minimax = pytest.importorskip("transformers.models.minimax")
modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")


def rename(mixer: LightningAttention, tensors: Named) -> Named:
    """There the rows of query, key and value of a head stand together."""
    by_head = tensors["qkv.weight"].unflatten(0, (3, mixer.heads, mixer.head_dim)).transpose(0, 1)
    return {
        "qkv_proj.weight": by_head.flatten(0, 2),
        "output_gate.weight": tensors["gate.weight"],
        "norm.weight": tensors["norm.weight"],
        "out_proj.weight": tensors["out.weight"],
    }


@pytest.mark.parametrize(
    ("dim", "heads", "layer", "depth", "batch", "time"),
    [(32, 4, 0, 4, 2, 7), (32, 8, 2, 4, 2, 19), (24, 3, 3, 4, 1, 35), (12, 1, 0, 1, 3, 1)],
)
def test_outputs_and_gradients_are_those_of_minimax(
    dim: int, heads: int, layer: int, depth: int, batch: int, time: int
):
    ours = randomised(LightningAttention(Site(dim=dim, layer=layer, depth=depth), heads=heads), std=0.1)
    config = minimax.MiniMaxConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        head_dim=dim // heads,
        block_size=16,
        layer_types=["linear_attention"] * depth,
    )
    theirs: nn.Module = modeling.MiniMaxLightningAttention(config, layer)
    theirs.load_state_dict(rename(ours, values(ours)), strict=False)
    missing = set(dict(theirs.named_parameters())) - set(rename(ours, values(ours)))
    assert not missing
    assert_same_mixer(ours, theirs, lambda x: theirs(x, None, None)[0], rename, batch, time, dim)


def faded(layer: int, time: int) -> torch.Tensor:
    """What is left of a memory of ones after tokens that write nothing, a number a head."""
    mixer = LightningAttention(Site(dim=16, layer=layer, depth=4), heads=4).double()
    nn.init.zeros_(mixer.qkv.weight)
    x = torch.randn(1, time, 16, dtype=torch.float64)
    start = type(mixer.init_state(1, time))(torch.ones(1, 4, 4, 4, dtype=torch.float64))
    return mixer.prefill(x, start, context(x))[1].memory[0, :, 0, 0]


def test_decays_are_the_slopes_of_alibi_in_the_first_layer_and_none_in_the_last():
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    assert_close(faded(0, 10), torch.exp(-10 * slopes), rtol=1e-3, atol=0)
    assert_close(faded(1, 10), torch.exp(-10 * slopes * 2 / 3), rtol=1e-3, atol=0)
    assert_close(faded(3, 10), torch.ones(4, dtype=torch.float64), rtol=1e-3, atol=0)
