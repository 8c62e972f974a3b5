from functools import partial

import pytest
import torch

from llmx import LanguageModel
from llmx.data.tokenizers import CharacterTokenizer
from llmx.errors import UserError
from llmx.mixers.attention import Attention
from llmx.mixers.gru import GRU
from llmx.networks.ngram import NGram
from llmx.networks.stacks import Looped
from llmx.protocol import Mixer
from llmx.training.maps import MixerMaps, mixer_maps
from tests.training.networks import factory, tiny

TOKENS = torch.tensor([3, 1, 4, 1, 0, 2])


class Weighted(Mixer):
    """Output t is a sum of the inputs up to t with fixed weights, others in each layer."""

    def __init__(self, site):
        super().__init__()
        weights = torch.rand(len(TOKENS), len(TOKENS), generator=torch.Generator().manual_seed(site.layer)).tril()
        self.weights = torch.nn.Parameter(weights)

    def forward(self, x, context):
        return self.weights @ x


class Still(Mixer):
    """Reads nothing."""

    def forward(self, x, context):
        return torch.zeros_like(x)


def test_a_map_is_what_the_mixer_of_that_layer_alone_does():
    network = tiny(Weighted)
    for layer, (title, shares) in enumerate(mixer_maps(network, TOKENS)):
        weights = network.blocks[layer].mixer.weights.detach()
        assert title == f"layer {layer}, Weighted"
        torch.testing.assert_close(shares, weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("mixer", [partial(Attention, heads=2), GRU])
def test_rows_are_causal_and_sum_to_1(mixer):
    for _, shares in mixer_maps(tiny(mixer), TOKENS):
        torch.testing.assert_close(shares.sum(-1), torch.ones(len(TOKENS)))
        assert not shares.triu(1).any()
        assert shares[-1, 0] > 0


def test_a_mixer_that_reads_nothing_has_an_empty_map():
    assert not any(shares.any() for _, shares in mixer_maps(tiny(lambda site: Still()), TOKENS))


def test_a_looped_stack_has_a_map_for_each_run():
    titles = [title for title, _ in mixer_maps(tiny(stack=partial(Looped, times=2)), TOKENS)]
    assert titles == ["layer 0, Attention", "layer 1, Attention"] * 2


def test_the_network_stays_as_it_is_and_gradient_checkpointing_makes_no_difference():
    network = tiny()
    state = torch.get_rng_state()
    expected = [shares for _, shares in mixer_maps(network, TOKENS)]
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    network.enable_gradient_checkpointing()
    torch.testing.assert_close([shares for _, shares in mixer_maps(network, TOKENS)], expected)


@pytest.mark.parametrize(
    ("network", "sentence", "expected"),
    [
        (partial(NGram, order=2), "", "NGram has no layers"),
        (factory(), "abc" * 3, "sentence: 9 tokens, and the window has 8"),
        (factory(), "abz", "sentence: the character 'z'"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_the_first_step(network, sentence, expected):
    tokenizer = CharacterTokenizer("abcde")
    model = LanguageModel(network, tokenizer, window=8)
    with pytest.raises(UserError, match=expected):
        MixerMaps(sentence).check(model)
