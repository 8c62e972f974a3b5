from types import SimpleNamespace

import pytest
import torch

from llmx.networks.decoder import Decoder
from llmx.networks.ngram import NGram
from llmx.training.norms import NormsByLayer, parts
from tests.training.networks import tiny


def test_every_parameter_is_in_one_part():
    named = parts(network := tiny(tied=True))
    assert list(named) == ["embedding", "layer_0", "layer_1", "norm"]  # a tied head has none of its own
    assert sum(p.numel() for part in named.values() for p in part) == sum(p.numel() for p in network.parameters())
    assert parts(NGram(5, 2)) == {}


@pytest.mark.parametrize(("step", "logged"), [(1, True), (2, False)])
def test_norms_are_logged_where_the_logger_takes_them(step, logged):
    network: Decoder = tiny()
    tokens = torch.randint(5, (3, 7))
    network.losses(tokens, tokens)[0].mean().backward()
    module = SimpleNamespace(network=network, log_dict=lambda norms, **_: seen.update(norms))
    seen = {}
    NormsByLayer().on_before_optimizer_step(SimpleNamespace(log_every_n_steps=2, global_step=step), module, None)
    assert bool(seen) == logged
    if logged:
        block = list(network.blocks[1].parameters())
        for kind, values in (("weight", block), ("gradient", [p.grad for p in block])):
            expected = torch.cat([value.detach().flatten() for value in values]).norm()
            torch.testing.assert_close(seen[f"{kind}_norm/layer_1"], expected)
