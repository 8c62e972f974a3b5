"""The protocol: sites, contexts, the default prefill as a loop over step, the defaults of Network."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.protocol import IGNORE, Context, Mixer, Network, Site, StatefulMixer, Stateless

VOCAB = 11


class AverageState(NamedTuple):
    value: Tensor  # (B, D)


class Average(StatefulMixer):
    """s_t = a s_{t-1} + (1 - a) v_t; v is mixed half and half with the v of the first Average below it.

    `forward` is written as one weighted sum over the past, `prefill` is the protocol's loop over `step`.
    """

    def __init__(self, site: Site):
        super().__init__()
        self.first = site.occurrence == 0
        self.value = nn.Linear(site.dim, site.dim)
        self.decay = nn.Parameter(torch.randn(site.dim))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        value = self.mix(x, context)
        time = torch.arange(x.shape[1])
        lag = time[:, None] - time  # (T, S)
        decay = self.decay.sigmoid()
        weights = (decay ** lag.clamp(min=0)[..., None]) * (lag >= 0)[..., None] * (1 - decay)  # (T, S, D)
        return torch.einsum("tsd,bsd->btd", weights, value)

    def init_state(self, batch_size: int, max_length: int) -> AverageState:
        return AverageState(self.decay.new_zeros(batch_size, self.decay.shape[0]))

    def step(self, x: Tensor, state: AverageState, context: Context) -> tuple[Tensor, AverageState]:
        decay = self.decay.sigmoid()
        value = decay * state.value + (1 - decay) * self.mix(x, context)
        return value, AverageState(value)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        value = self.value(x)
        if self.first:
            context.store["first value"] = value
        return (value + context.store["first value"]) / 2


class TokenGain(Stateless):
    """A feed-forward that looks at the context: a gain for each token, and for each position."""

    def __init__(self, site: Site):
        super().__init__()
        self.gain = nn.Embedding(VOCAB, site.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x * self.gain(context.tokens) * (1 + context.positions[..., None])


def decoder(*blocks: type[Mixer] | partial[Mixer], feed_forward: type[Mixer] | partial[Mixer] | None = None) -> Decoder:
    """A float64 decoder with one block a mixer, its weights far from any initialisation."""
    torch.manual_seed(0)
    factories = iter(blocks)
    feed_forward = feed_forward or partial(SwiGLU, hidden=12)
    network = Decoder(
        VOCAB, lambda site: PreNormBlock(site, next(factories), feed_forward), dim=8, depth=len(blocks)
    ).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def context(tokens: Tensor) -> Context:
    return Context(tokens, torch.arange(tokens.shape[1])[None], torch.zeros(*tokens.shape, 4))


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


class Recorder(Stateless):
    def __init__(self, site: Site, width: int = 1):
        super().__init__()
        self.site = site

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x


class OtherRecorder(Recorder):
    pass


def test_occurrence_counts_components_of_the_same_kind_over_a_hybrid_stack():
    kinds = [Recorder, OtherRecorder, partial(Recorder, width=2), partial(OtherRecorder, width=3), Recorder]
    factories = iter(kinds)
    network = Decoder(
        VOCAB, lambda site: PreNormBlock(site, next(factories), partial(SwiGLU, hidden=4)), dim=8, depth=5
    )
    sites = [block.mixer.site for block in network.layers]
    assert [site.occurrence for site in sites] == [0, 0, 1, 1, 2]
    assert [site.layer for site in sites] == [0, 1, 2, 3, 4]
    assert {site.depth for site in sites} == {5}
    assert {site.dim for site in sites} == {8}


def test_a_kind_counts_in_whichever_slot_it_stands():
    network = Decoder(VOCAB, partial(PreNormBlock, mixer=Recorder, feed_forward=Recorder), dim=8, depth=2)
    sites = [(block.mixer.site.occurrence, block.feed_forward.site.occurrence) for block in network.layers]
    assert sites == [(0, 1), (2, 3)]


def test_two_networks_do_not_count_each_other():
    for _ in range(2):
        network = Decoder(VOCAB, partial(PreNormBlock, mixer=Recorder, feed_forward=SwiGLU), dim=8, depth=2)
        assert [block.mixer.site.occurrence for block in network.layers] == [0, 1]


def test_context_at_is_the_column_of_everything():
    whole = context(tokens(3, 5))
    whole.store["per row"] = torch.randn(3, 5, 2)
    whole.store["shared"] = torch.randn(1, 5, 2)
    one = whole.at(2)
    assert_close(one.tokens, whole.tokens[:, 2])
    assert_close(one.positions, torch.tensor([2]))
    assert_close(one.embedding, whole.embedding[:, 2])
    assert_close(one.store["per row"], whole.store["per row"][:, 2])
    assert_close(one.store["shared"], whole.store["shared"][:, 2])


def test_context_at_does_not_write_back():
    whole = context(tokens(3, 5))
    whole.at(2).store["new"] = torch.zeros(3)
    assert whole.store == {}


def test_auxiliary_losses_add_up_in_float32():
    whole = context(tokens(2, 3))
    assert whole.auxiliary == 0
    whole.add_loss(torch.tensor(0.25))
    whole.add_loss(torch.tensor(0.5))
    assert whole.auxiliary == 0.75
    assert whole.auxiliary.dtype == torch.float32


@pytest.mark.parametrize("mixers", [[Average], [Average] * 3, [Average, partial(Attention, heads=2), Average]])
@pytest.mark.parametrize("lengths", [[7], [1, 6], [3, 1, 3], [1] * 7])
def test_prefill_as_a_loop_over_step_equals_forward(mixers: list[type[Mixer]], lengths: list[int]):
    network, text = decoder(*mixers), tokens(3, 7)
    state, outputs = network.init_state(3, 7), []
    for piece in text.split(lengths, 1):
        logits, state = network.prefill(piece, state)
        outputs.append(logits)
    assert_close(torch.cat(outputs, 1), network(text), rtol=1e-10, atol=1e-10)  # float64, sums in another order


def test_prefill_as_a_loop_over_step_fills_the_store_like_forward():
    torch.manual_seed(0)
    mixer, x = Average(Site(dim=4)).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    looped, parallel = context(tokens(2, 5)), context(tokens(2, 5))
    mixer.prefill(x, mixer.init_state(2, 5), looped)
    mixer(x, parallel)
    assert_close(looped.store["first value"], parallel.store["first value"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[6], [1, 5], [1] * 6])
def test_a_stateless_component_sees_the_same_context_in_step_and_in_forward(lengths: list[int]):
    network, text = decoder(Average, feed_forward=TokenGain), tokens(3, 6)
    state, outputs = network.init_state(3, 6), []
    for piece in text.split(lengths, 1):
        if piece.shape[1] == 1:
            logits, state = network.step(piece[:, 0], state)
            outputs.append(logits[:, None])
        else:
            logits, state = network.prefill(piece, state)
            outputs.append(logits)
    assert_close(torch.cat(outputs, 1), network(text), rtol=1e-10, atol=1e-10)


class Unigram(Network):
    """The least a network can be: logits that know the last token only."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.table = nn.Embedding(vocab_size, vocab_size)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Context]:
        hidden = self.table(tokens)
        made = Context(tokens, torch.arange(tokens.shape[1])[None], hidden)
        made.add_loss(hidden.square().mean())
        return hidden, made

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loss_is_the_negative_log_likelihood_in_float32_and_0_at_ignore(dtype: torch.dtype):
    torch.manual_seed(0)
    network = Unigram(VOCAB).to(dtype)
    targets = tokens(2, 4).clone()
    targets[0, 1] = targets[1, 3] = IGNORE
    hidden = network.hidden(tokens(2, 4))[0]
    losses = network.loss(hidden, targets)
    assert losses.dtype == torch.float32
    assert losses.shape == targets.shape
    for b in range(2):
        for t in range(4):
            row = hidden[b, t].double()
            expected = 0.0 if targets[b, t] == IGNORE else (row.exp().sum().log() - row[targets[b, t]]).item()
            assert losses[b, t].item() == pytest.approx(expected, abs=1e-5)  # float32 rounding of numbers below 10


def test_an_ignored_target_sends_no_gradient():
    network = Unigram(VOCAB)
    targets = torch.tensor([[3, IGNORE]])
    network.losses(torch.tensor([[1, 2]]), targets)[0].sum().backward()
    assert network.table.weight.grad[1].abs().sum() > 0
    assert network.table.weight.grad[2].abs().sum() == 0


def test_losses_are_the_loss_of_the_hidden_and_the_auxiliary_sum():
    network, text = Unigram(VOCAB), tokens(2, 4)
    losses, auxiliary = network.losses(text, text)
    assert_close(losses, network.loss(network.hidden(text)[0], text), rtol=0, atol=0)
    assert_close(auxiliary, network.hidden(text)[0].square().mean())


def test_a_network_without_a_state_says_so():
    network = Unigram(VOCAB)
    assert not network.stateful
    with pytest.raises(TypeError, match="Unigram has no state"):
        network.init_state(1, 4)
    with pytest.raises(TypeError, match="Unigram has no state"):
        network.prefill(tokens(1, 4), ())
    with pytest.raises(TypeError, match="Unigram has no state"):
        network.step(tokens(1, 1)[:, 0], ())
    with pytest.raises(ValueError, match="Unigram has no blocks"):
        network.enable_gradient_checkpointing()
