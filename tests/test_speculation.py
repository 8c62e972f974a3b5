"""Speculation: the text is that of ordinary sampling, whatever the drafts are worth; good drafts save passes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmx import LanguageModel
from llmx.blocks.prenorm import PreNormBlock
from llmx.data.tokenizers import ByteTokenizer
from llmx.errors import UserError
from llmx.feedforward.rwkv_channel_mix import RWKVChannelMix
from llmx.feedforward.swiglu import SwiGLU
from llmx.generation import Sampling, generate
from llmx.mixers.attention import Attention
from llmx.mixers.gru import GRU
from llmx.mixers.mamba import Mamba
from llmx.mixers.sliding_window import SlidingWindowAttention
from llmx.networks.decoder import Decoder
from llmx.networks.heads import LinearHead
from llmx.networks.multi_token import MultiTokenHead
from llmx.networks.stacks import Looped
from llmx.protocol import Context, Mixer, Site
from tests.forms import perturbed

VOCAB = 7
ATTENTION = partial(Attention, heads=2)
SWIGLU = partial(SwiGLU, hidden=12)
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=24, temperature=0),
    "plain": Sampling(max_new_tokens=24, seed=1),
    "top_k": Sampling(max_new_tokens=24, temperature=3.0, top_k=3, seed=2),
    "top_p": Sampling(max_new_tokens=24, temperature=1.5, top_p=0.8, min_p=0.05, seed=3),
}


class Uncached(Mixer):
    """Forward alone."""

    def __init__(self, site: Site):
        super().__init__()
        self.attention = Attention(site, heads=2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.attention(x, context)


def decoder(mixer: Any = ATTENTION, feed_forward: Any = SWIGLU, **arguments: Any) -> Decoder:
    """Random weights in float64, and drafts that are right now and then."""
    torch.manual_seed(0)
    block = partial(PreNormBlock, mixer=mixer, feed_forward=feed_forward)
    return perturbed(Decoder(VOCAB, block, dim=8, depth=2, **{"head": MultiTokenHead, **arguments}), 0.5)


def cycle(shift: int = 1) -> Decoder:
    """Predicts token + 1 after every token, and drafts token + 1 + k shift: the right ones for a shift of 1."""
    block = partial(PreNormBlock, mixer=partial(Attention, heads=1), feed_forward=SWIGLU)
    network = Decoder(VOCAB, block, dim=8, depth=1, head=MultiTokenHead)
    with torch.no_grad():
        for parameter in network.blocks.parameters():
            parameter.zero_()
        network.embedding.weight.copy_(torch.eye(VOCAB, 8))
        after = torch.eye(VOCAB).roll(1, 0)  # a token's unit vector -> that of the next one
        network.head.linear.weight.copy_(nn.functional.pad(after, (0, 1)))
        steps = [after.matrix_power(k * shift % VOCAB) for k in (1, 2, 3)]
        network.head.further.weight.copy_(torch.cat([nn.functional.pad(10 * m, (0, 1, 0, 1)) for m in steps]))
    return network.double()


def prompts(rows: int, time: int = 3) -> Tensor:
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(3))


def speculating(sampling: Sampling, drafts: int = 3) -> Sampling:
    return Sampling(**{**vars(sampling), "speculate": drafts})


def counted(network: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that receives the number of tokens each pass reads."""
    reads: list[int] = []
    prefill: Callable[..., Any] = network.prefill_ahead

    def counting(tokens: Tensor, *rest: Any) -> Any:
        reads.append(tokens.shape[1])
        return prefill(tokens, *rest)

    monkeypatch.setattr(network, "prefill_ahead", counting)
    return reads


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"mixer": partial(SlidingWindowAttention, heads=2, window=3)},  # a ring, which drafts overwrite
        {"mixer": GRU},
        {"mixer": Mamba, "feed_forward": RWKVChannelMix},
        {"stack": Looped},
    ],
    ids=["attention", "ring", "gru", "mamba", "looped"],
)
def test_the_text_is_that_of_ordinary_sampling(parts: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch):
    network, sampling = decoder(**parts), SAMPLINGS[how]
    reads = counted(network, monkeypatch)
    for rows, window in ((1, 32), (3, 9)):  # within the window, and past it
        expected = generate(network, prompts(rows), window, sampling)
        reads.clear()
        assert torch.equal(generate(network, prompts(rows), window, speculating(sampling)), expected)
        assert max(reads) <= 8
        assert how == "greedy" or len(expected.unique()) > 1  # the text is not one letter


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_any_number_of_drafts_and_any_window_give_the_same_text(drafts: int, window: int):
    network, sampling = decoder(), Sampling(max_new_tokens=12, temperature=1.5)
    for length in (1, 7):
        expected = generate(network, prompts(2, length), window, sampling)
        assert torch.equal(generate(network, prompts(2, length), window, speculating(sampling, drafts)), expected)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_a_short_text_is_as_long_as_wanted(tokens: int):
    sampling = Sampling(max_new_tokens=tokens, temperature=0)
    expected = generate(cycle(), prompts(2), 64, sampling)
    assert expected.shape == (2, tokens)
    assert torch.equal(generate(cycle(), prompts(2), 64, speculating(sampling)), expected)


def test_drafts_that_are_right_give_four_tokens_a_pass(monkeypatch):
    network, sampling = cycle(), Sampling(max_new_tokens=41, temperature=0)
    reads = counted(network, monkeypatch)
    made = generate(network, prompts(3), 64, speculating(sampling))
    assert torch.equal(made, (prompts(3)[:, -1:] + torch.arange(1, 42)) % VOCAB)
    assert reads == [3] + [4] * 10  # the prompt for the first token, then the last token with three drafts


def test_drafts_that_are_wrong_cost_passes_and_nothing_else(monkeypatch):
    network, sampling = cycle(shift=2), Sampling(max_new_tokens=40, temperature=0)
    expected = generate(network, prompts(2), 64, sampling)
    reads = counted(network, monkeypatch)
    assert torch.equal(generate(network, prompts(2), 64, speculating(sampling)), expected)
    assert 40 < len(reads) <= 50  # a token each, and now and then one that catches up
    assert max(reads) <= 7


def test_the_rows_go_on_by_what_stands_in_all_of_them(monkeypatch):
    network, sampling = cycle(), Sampling(max_new_tokens=20, temperature=0)
    with torch.no_grad():
        network.head.further.weight[:, 0] = 0  # after token 0 alone the drafts are wrong
    passes = []
    for prompt in (torch.tensor([[1]]), torch.tensor([[1], [2], [3], [4]])):
        expected = generate(network, prompt, 64, sampling)
        with monkeypatch.context() as patch:
            reads = counted(network, patch)
            assert torch.equal(generate(network, prompt, 64, speculating(sampling)), expected)
            passes.append(len(reads))
    assert passes[0] < passes[1] < 20


def test_a_network_that_has_learned_makes_drafts_that_stand_more_often_than_not(monkeypatch):
    torch.manual_seed(0)
    block = partial(PreNormBlock, mixer=ATTENTION, feed_forward=SWIGLU)
    network = Decoder(VOCAB, block, dim=16, depth=1, head=MultiTokenHead)
    text = torch.tensor([0, 3, 1, 5, 2, 4, 6] * 4)
    rows = text.unfold(0, 15, 1)[:7]  # every phase of the cycle
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(30):
        losses, auxiliary = network.losses(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (losses.mean() + auxiliary).backward()
        optimizer.step()
    sampling = Sampling(max_new_tokens=40, temperature=0.5)
    expected = generate(network, rows[:1, :4], 14, sampling)
    reads = counted(network, monkeypatch)
    assert torch.equal(generate(network, rows[:1, :4], 14, speculating(sampling)), expected)
    assert len(reads) < 25


def test_the_global_random_state_is_neither_read_nor_moved():
    network = decoder()
    before = torch.get_rng_state()
    generate(network, prompts(2), 8, speculating(SAMPLINGS["plain"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "drafts", "message"),
    [
        (partial(decoder, head=LinearHead), 1, "makes no drafts"),
        (decoder, 4, "4 is more than the 3 drafts"),
        (partial(decoder, Uncached), 2, "a mixer without a state"),
    ],
)
def test_a_network_that_cannot_speculate_says_why(network: Callable[[], Decoder], drafts: int, message: str):
    with pytest.raises(ValueError, match=f"^speculate: .*{message}"):
        generate(network(), prompts(1), 8, Sampling(speculate=drafts))


def test_fewer_drafts_than_none_are_refused():
    with pytest.raises(ValueError, match=r"^speculate: -1 is below 0"):
        Sampling(speculate=-1)


def test_the_model_speculates_where_asked_and_refuses_early_where_it_cannot():
    block = partial(PreNormBlock, mixer=ATTENTION, feed_forward=SWIGLU)
    make = partial(partial, Decoder, block=block, dim=8, depth=1)
    model = LanguageModel(make(head=MultiTokenHead), ByteTokenizer(), window=8)
    assert model.generate("ab", max_new_tokens=20, speculate=3) == model.generate("ab", max_new_tokens=20)
    with pytest.raises(UserError, match=r"^speculate: 9 is more than"):
        model.generate("ab", speculate=9)
    with pytest.raises(UserError, match=r"^model\.sampling\.speculate: this network makes no drafts"):
        LanguageModel(make(head=LinearHead), ByteTokenizer(), window=8, sampling=Sampling(speculate=2))
