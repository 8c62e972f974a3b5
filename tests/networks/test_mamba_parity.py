"""Stacks of Mamba and of Mamba-2 without feed-forward: those of transformers, on the same weights."""

from functools import partial
from typing import Any

import pytest
from torch import nn

from llmx.blocks.mixer_only import MixerOnlyBlock
from llmx.mixers.mamba import Mamba
from llmx.mixers.mamba2 import Mamba2
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from tests.mixers.test_mamba import as_mamba
from tests.mixers.test_mamba2 import as_mamba2
from tests.parity import VOCAB, Named, assert_same_network, randomised, values

mamba = pytest.importorskip("transformers.models.mamba")
mamba2 = pytest.importorskip("transformers.models.mamba2")

DIM, DEPTH, EPS = 8, 2, 1e-5
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "layer_norm_epsilon": EPS,
    "tie_word_embeddings": True,
    "use_cache": False,
}
CASES = [
    (Mamba, {"state": 5}, mamba.MambaForCausalLM, mamba.MambaConfig(state_size=5, **SHARED)),
    (
        Mamba2,
        {"state": 5, "heads": 2},
        mamba2.Mamba2ForCausalLM,
        mamba2.Mamba2Config(state_size=5, num_heads=2, head_dim=DIM, n_groups=1, chunk_size=4, **SHARED),
    ),
]


def named_as_theirs(network: Any, tensors: Named) -> Named:
    named = {
        "backbone.embeddings.weight": tensors["embedding.table.weight"],
        "backbone.norm_f.weight": tensors["norm.weight"],
    }
    for layer, block in enumerate(network.layers):
        start, theirs = f"blocks.{layer}.mixer.", f"backbone.layers.{layer}"
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        renamed = as_mamba(block.mixer, own) if isinstance(block.mixer, Mamba) else as_mamba2(block.mixer, own)
        named[f"{theirs}.norm.weight"] = tensors[f"blocks.{layer}.norm.weight"]
        named |= {f"{theirs}.mixer.{name}": tensor for name, tensor in renamed.items()}
    return named


@pytest.mark.parametrize(("mixer", "options", "reference", "config"), CASES, ids=["mamba", "mamba2"])
@pytest.mark.parametrize(("batch", "time"), [(2, 11), (1, 1)])
def test_logits_and_gradients_are_those_of_transformers(mixer, options, reference, config, batch, time):
    block = partial(MixerOnlyBlock, mixer=partial(mixer, **options))
    ours = randomised(Decoder(VOCAB, block, dim=DIM, depth=DEPTH, norm=partial(RMSNorm, eps=EPS), tied=True))
    theirs: nn.Module = reference(config)
    named = named_as_theirs(ours, values(ours))
    theirs.load_state_dict(named | {"lm_head.weight": named["backbone.embeddings.weight"]})
    assert_same_network(ours, theirs, named_as_theirs, batch, time)
