"""Generation: the text that recomputing every prefix gives, cuts that keep their promise, and nothing disturbed."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.generation import Sampling, choose, generate
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.protocol import Context, Mixer, Network, Site

VOCAB = 13
ATTENTION = partial(Attention, heads=2)


class UncachedAttention(Mixer):
    """Attention as somebody's first draft: forward alone."""

    def __init__(self, site: Site):
        super().__init__()
        self.attention = Attention(site, heads=2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.attention(x, context)


def decoder(mixer: type[Mixer] | partial[Mixer] = ATTENTION, dropout: float = 0.0) -> Decoder:
    """Random weights that spread the logits out, in float64, so that no argmax is near a tie."""
    torch.manual_seed(0)
    block = partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=12), dropout=dropout)
    network = Decoder(VOCAB, block, dim=8, depth=2).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def prompts(batch: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(3))


def greedy(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, temperature=0)


@torch.no_grad()
def slow_greedy(network: Network, prompt: Tensor, window: int, tokens: int) -> Tensor:
    """One row, a list of what the network can see; past the window it keeps the last half, then lets it grow again."""
    seen, text = prompt.tolist()[-window:], []
    for _ in range(tokens):
        if len(seen) > window:
            seen = seen[-max(1, window // 2) :]
        text.append(network(torch.tensor([seen]))[0, -1].argmax().item())
        seen = [*seen, text[-1]]
    return torch.tensor(text)


@given(start=st.integers(1, 12), window=st.integers(1, 12), tokens=st.integers(0, 20))
def test_greedy_text_is_what_recomputing_every_prefix_gives(start: int, window: int, tokens: int):
    network = decoder()
    text = generate(network, prompts(3, start), window, greedy(tokens))
    assert text.shape == (3, tokens)
    for row in range(3):
        assert text[row].tolist() == slow_greedy(network, prompts(3, start)[row], window, tokens).tolist()


def test_within_the_window_every_token_sees_the_whole_text():
    network, prompt = decoder(), prompts(2, 3)
    text = torch.cat((prompt, generate(network, prompt, 20, greedy(17))), 1)
    logits = network(text)
    assert torch.equal(logits[:, 2:-1].argmax(-1), text[:, 3:])
    assert len(text.unique()) > 3  # the text is not one letter


@pytest.mark.parametrize("sampling", [greedy(25), Sampling(max_new_tokens=25, temperature=2.0, seed=4)])
def test_a_mixer_with_forward_alone_generates_the_text_of_the_same_mixer_with_a_state(sampling: Sampling):
    stateful, plain = decoder(), decoder(UncachedAttention)
    weights = stateful.state_dict()
    plain.load_state_dict({name.replace("mixer.", "mixer.attention."): tensor for name, tensor in weights.items()})
    assert stateful.stateful
    assert not plain.stateful
    assert torch.equal(generate(stateful, prompts(2, 4), 10, sampling), generate(plain, prompts(2, 4), 10, sampling))


class Recorder(Network):
    """Uniform logits, and a record of the contexts it was given."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.contexts: list[Tensor] = []

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Context]:
        self.contexts.append(tokens.clone())
        hidden = torch.zeros(*tokens.shape, self.vocab_size)
        return hidden, Context(tokens, torch.arange(tokens.shape[1])[None], hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@given(start=st.integers(1, 30), window=st.integers(1, 12))
def test_no_network_is_asked_about_more_than_the_window_nor_shown_less_than_half_of_it(start: int, window: int):
    network = Recorder(VOCAB)
    text = torch.cat((prompts(2, start), generate(network, prompts(2, start), window, Sampling(max_new_tokens=30))), 1)
    assert len(network.contexts) == 30
    for end, context in enumerate(network.contexts, start):
        length = context.shape[1]
        assert min(end, max(1, window // 2)) <= length <= window
        assert torch.equal(context, text[:, end - length : end])
    assert network.contexts[0].shape[1] == min(start, window)


def test_a_long_prompt_counts_with_its_end():
    network, prompt = decoder(), prompts(2, 20)
    changed = prompt.clone()
    changed[:, :12] = 0
    assert torch.equal(generate(network, prompt, 8, greedy(20)), generate(network, changed, 8, greedy(20)))


def test_each_row_is_continued_by_itself():
    network, prompt = decoder(), prompts(3, 5)
    together = generate(network, prompt, 9, greedy(12))
    for row in range(3):
        assert torch.equal(together[row : row + 1], generate(network, prompt[row : row + 1], 9, greedy(12)))


DRAWS = 20_000
FOUR = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()  # logits of these probabilities


def noise_like(logits: Tensor, seed: int) -> Tensor:
    return torch.empty(logits.shape).exponential_(generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, **arguments: Any) -> Tensor:
    """How often each token came, of DRAWS."""
    many = logits.expand(DRAWS, -1)
    return choose(many, Sampling(**arguments), noise_like(many, seed=5)).bincount(minlength=len(logits))


def assert_drawn_from(counts: Tensor, probabilities: list[float]) -> None:
    """Impossible tokens never came, and the chi-square of the others is within its 99.9 % quantile."""
    expected = DRAWS * torch.tensor(probabilities) / sum(probabilities)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected).square() / expected)[possible].sum().item()
    assert chi_square < {1: 1e-6, 2: 10.83, 3: 13.82, 4: 16.27}[int(possible.sum())]


@pytest.mark.parametrize(
    ("arguments", "probabilities"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"temperature": 2.0}, [0.5**0.5, 0.3**0.5, 0.15**0.5, 0.05**0.5]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_k": 99}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.79}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.81}, [0.5, 0.3, 0.15, 0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"min_p": 0.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"min_p": 0.2}, [0.5, 0.3, 0.15, 0]),
        ({"min_p": 0.59}, [0.5, 0.3, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # after top_k the first has 0.625
        ({"top_p": 0.6, "min_p": 0.7}, [1, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.65}, [1, 0, 0, 0]),  # the cuts see the tempered distribution: 0.685 first
    ],
)
def test_tokens_are_drawn_from_the_cut_distribution(arguments: dict[str, Any], probabilities: list[float]):
    order = torch.tensor([2, 0, 3, 1])  # the most likely token is not the first
    assert_drawn_from(draw(FOUR[order], **arguments), [probabilities[i] for i in order])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9, unique=True), st.floats(0.1, 5))
def test_top_k_1_and_min_p_1_take_the_most_likely_token(numbers: list[float], temperature: float):
    logits = (torch.tensor(numbers).argsort().argsort().float())[None]  # distinct beyond rounding
    noise = noise_like(logits, seed=0)
    for sampling in (Sampling(temperature=temperature, top_k=1), Sampling(temperature=temperature, min_p=1.0)):
        assert choose(logits, sampling, noise) == logits.argmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_a_temperature_towards_0_takes_the_most_likely_token(temperature: float, shift: float):
    assert_drawn_from(draw(FOUR.flip(0) + shift, temperature=temperature), [0, 0, 0, 1])


def test_at_most_top_k_tokens_remain_where_logits_are_equal():
    assert (draw(torch.zeros(4), top_k=2) > 0).sum() == 2


def test_rows_are_drawn_independently():
    logits = torch.zeros(2, DRAWS // 2, 2).flatten(0, 1)
    first, second = choose(logits, Sampling(), noise_like(logits, seed=5)).view(2, -1)
    agreement = (first == second).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(DRAWS / 2))  # five standard errors


def test_low_precision_logits_are_sampled_in_float32():
    assert_drawn_from(draw(FOUR.bfloat16()), FOUR.bfloat16().float().exp().tolist())


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    network, prompt = decoder(), prompts(2, 4)
    texts = [
        generate(network, prompt, 10, Sampling(max_new_tokens=30, temperature=5.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_longer_text_begins_as_the_shorter_one():
    network, prompt = decoder(), prompts(2, 4)
    short, long = (generate(network, prompt, 10, Sampling(max_new_tokens=n, temperature=3.0)) for n in (9, 20))
    assert torch.equal(long[:, :9], short)


def test_the_global_random_state_is_neither_read_nor_moved():
    network, texts = decoder(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        texts.append(generate(network, prompts(2, 4), 8, Sampling(max_new_tokens=20, temperature=3.0)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*texts)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_left_as_it_was_and_dropout_is_off(training: bool):
    network, prompt = decoder(UncachedAttention, dropout=0.5).train(training), prompts(2, 4)
    expected = generate(decoder(UncachedAttention), prompt, 8, greedy(20))
    assert torch.equal(generate(network, prompt, 8, greedy(20)), expected)
    assert network.training is training
    assert network.blocks[0].training is training


def test_the_training_mode_is_restored_after_an_error():
    network = decoder().train()
    with pytest.raises(IndexError):
        generate(network, torch.tensor([[VOCAB]]), 8, greedy(3))
    assert network.training


def test_no_new_tokens_is_an_empty_text_and_the_prompt_is_left_alone():
    network, prompt = decoder(), prompts(2, 4)
    kept = prompt.clone()
    assert generate(network, prompt, 8, greedy(0)).shape == (2, 0)
    generate(network, prompt, 8, greedy(9))
    assert torch.equal(prompt, kept)


def test_generation_keeps_no_graph():
    assert not generate(decoder(), prompts(1, 2), 8, greedy(3)).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Sampling(**{name: value})
