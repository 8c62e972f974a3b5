"""The decoder: its size, its causality, its recurrence, its training-time switches."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.networks.heads import LinearHead
from llmx.protocol import IGNORE, Context, Mixer, Site

VOCAB, TIME = 13, 9
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def decoder(kv_heads: int = 2, block_dropout: float = 0.0, **arguments: Any) -> Decoder:
    """A float64 decoder, its weights so far from any initialisation that nothing hides behind small numbers."""
    torch.manual_seed(0)
    block = partial(
        PreNormBlock,
        mixer=partial(Attention, heads=4, kv_heads=kv_heads),
        feed_forward=partial(SwiGLU, hidden=12),
        dropout=block_dropout,
    )
    network = Decoder(VOCAB, **{"block": block, "dim": 16, "depth": 2, **arguments}).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def tokens(batch: int = 2, time: int = TIME, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def in_pieces(network: Decoder, text: Tensor, pieces: list[tuple[int, bool]], room: int) -> Tensor:
    """The logits of a text read piece by piece; a piece is (length, whether it is read by step)."""
    state, logits, begin = network.init_state(text.shape[0], room), [], 0
    for length, by_step in pieces:
        piece = text[:, begin : begin + length]
        begin += length
        if by_step:
            for t in range(length):
                one, state = network.step(piece[:, t], state)
                logits.append(one[:, None])
        else:
            many, state = network.prefill(piece, state)
            logits.append(many)
    assert state.position.tolist() == [text.shape[1]] * text.shape[0]
    return torch.cat(logits, 1)


@st.composite
def segmentations(draw: st.DrawFn) -> list[tuple[int, bool]]:
    cuts = sorted(draw(st.sets(st.integers(1, TIME - 1))))
    return [(end - begin, draw(st.booleans())) for begin, end in pairwise([0, *cuts, TIME])]


@given(segmentations(), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.booleans())
def test_any_segmentation_into_prefill_and_step_gives_the_logits_of_forward(
    pieces: list[tuple[int, bool]], kv_heads: int, spare: int, gradients: bool
):
    network, text = decoder(kv_heads), tokens()
    with torch.set_grad_enabled(gradients):
        assert_close(in_pieces(network, text, pieces, TIME + spare), network(text), **SAME)


@given(segmentations(), st.sampled_from([1, 2, 4]))
def test_any_segmentation_gives_the_gradients_of_forward(pieces: list[tuple[int, bool]], kv_heads: int):
    network, text = decoder(kv_heads), tokens()
    projection = torch.randn(2, TIME, VOCAB, dtype=torch.float64)
    names, parameters = zip(*network.named_parameters(), strict=True)
    parallel = torch.autograd.grad((network(text) * projection).sum(), parameters)
    recurrent = torch.autograd.grad((in_pieces(network, text, pieces, TIME) * projection).sum(), parameters)
    for name, one, other in zip(names, parallel, recurrent, strict=True):
        assert one.abs().max() > 1e-3, name
        assert_close(one, other, rtol=1e-10, atol=1e-9, msg=name)  # float64; the gradients are up to some hundreds


def test_the_same_state_read_twice_with_gradients_gives_the_same_twice():
    network, text = decoder(), tokens()
    _, state = network.prefill(text[:, :4], network.init_state(2, TIME))
    kept = [leaf.clone() for leaf in tree_leaves(state)]
    first, _ = network.prefill(text[:, 4:], state)
    again, _ = network.prefill(text[:, 4:], state)
    stepped, _ = network.step(text[:, 4], state)
    assert torch.equal(first, again)
    assert_close(stepped, first[:, 0], **SAME)
    assert all(torch.equal(leaf, old) for leaf, old in zip(tree_leaves(state), kept, strict=True))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_batch_of_texts_of_different_lengths_steps_as_each_text_does_alone(gradients: bool):
    network, lengths = decoder(), [1, 4, 6]
    texts = [tokens(1, length, seed=length) for length in lengths]
    with torch.set_grad_enabled(gradients):
        alone = [network.prefill(text, network.init_state(1, 11))[1] for text in texts]  # 6 + 3 + 2 tokens at most
        together = tree_map(lambda *leaves: torch.cat(leaves), *alone)
        for t in range(3):
            new = tokens(3, 3)[:, t]
            logits, together = network.step(new, together)
            for row in range(3):
                expected, alone[row] = network.step(new[row : row + 1], alone[row])
                assert_close(logits[row : row + 1], expected, **SAME)
        more, _ = network.prefill(tokens(3, 2), together)
        for row in range(3):
            assert_close(more[row : row + 1], network.prefill(tokens(3, 2)[row : row + 1], alone[row])[0], **SAME)


@given(st.integers(0, TIME - 1), st.integers(0, 1000))
def test_logits_at_a_position_ignore_later_tokens(position: int, seed: int):
    network, text = decoder(), tokens()
    changed = text.clone()
    changed[:, position + 1 :] = tokens(seed=seed)[:, position + 1 :]
    changed[:, position + 1 :] += changed[:, position + 1 :] == text[:, position + 1 :]
    changed %= VOCAB
    before, after = network(text), network(changed)
    assert_close(before[:, : position + 1], after[:, : position + 1], rtol=0, atol=1e-12)  # the same sums of numbers
    if position + 1 < TIME:
        assert ((before - after).abs().amax((0, 2))[position + 1 :] > 1e-6).all()  # later logits do change


def test_rows_of_a_batch_do_not_see_each_other():
    network, text = decoder(), tokens(4)
    whole = network(text)
    for row in range(4):
        assert_close(whole[row : row + 1], network(text[row : row + 1]), **SAME)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(network(text[order]), whole[order], **SAME)


def test_the_order_of_earlier_tokens_matters():
    network, text = decoder(), torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4], [2, 3, 1, 4]])
    last = network(text)[:, -1]
    assert torch.pdist(last).min() > 1e-3


def honest(**arguments: Any) -> Decoder:
    block = partial(PreNormBlock, mixer=partial(Attention, heads=8), feed_forward=partial(SwiGLU, hidden=341))
    return Decoder(65, block, dim=128, depth=4, **arguments)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_honest_model_of_the_experiments_dimensions_has_803_712_parameters():
    assert count(honest()) == 803_712
    assert count(honest(head=partial(LinearHead, bias=True))) == 803_712 + 65
    assert count(honest(tied=True)) == 803_712 - 65 * 128


def test_tied_weights_are_one_parameter_with_the_gradients_of_both_uses():
    tied, loose = decoder(tied=True), decoder()
    assert tied.head.linear.weight is tied.embedding.weight
    weights = tied.state_dict()
    loose.load_state_dict(weights)
    text = tokens()
    assert_close(tied(text), loose(text), rtol=0, atol=0)
    for network in (tied, loose):
        network(text).square().sum().backward()
    assert_close(tied.embedding.weight.grad, loose.embedding.weight.grad + loose.head.linear.weight.grad, **SAME)


def test_head_bias_is_added_to_the_logits():
    network = decoder(head=partial(LinearHead, bias=True))
    plain = decoder()
    plain.load_state_dict(network.state_dict(), strict=False)
    assert plain.head.linear.bias is None
    assert_close(network(tokens()), plain(tokens()) + network.head.linear.bias, **SAME)


@pytest.mark.parametrize("arguments", [{"dropout": 0.4}, {"block_dropout": 0.4}])
def test_dropout_acts_in_training_only(arguments: dict[str, float]):
    network, text, plain = decoder(**arguments), tokens(), decoder()(tokens())
    network.train()
    assert not torch.allclose(network(text), plain)
    assert not torch.equal(network(text), network(text))
    network.eval()
    assert torch.equal(network(text), plain)


@pytest.mark.parametrize("train", [True, False])
def test_gradient_checkpointing_changes_no_bit_of_losses_and_gradients(train: bool):
    plain, checkpointed = decoder().float().train(train), decoder().float().train(train)
    checkpointed.enable_gradient_checkpointing()
    text = tokens(2, TIME + 1)
    for network in (plain, checkpointed):
        losses, auxiliary = network.losses(text[:, :-1], text[:, 1:])
        (losses.mean() + auxiliary).backward()
    assert torch.equal(plain(text), checkpointed(text))
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


class Counting(Mixer):
    """Counts how often it runs."""

    def __init__(self, site: Site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)
        self.runs = 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.runs += 1
        return self.linear(x)


def test_gradient_checkpointing_runs_each_block_again_in_the_backward_pass():
    block = partial(PreNormBlock, mixer=Counting, feed_forward=partial(SwiGLU, hidden=12))
    network = decoder(block=block)
    network.enable_gradient_checkpointing()
    logits = network(tokens())
    assert [layer.mixer.runs for layer in network.layers] == [1, 1]
    logits.sum().backward()
    assert [layer.mixer.runs for layer in network.layers] == [2, 2]
    with torch.no_grad():
        network(tokens())
    assert [layer.mixer.runs for layer in network.layers] == [3, 3]


@pytest.mark.parametrize("arguments", [{}, {"tied": True}, {"head": partial(LinearHead, bias=True)}, {"kv_heads": 1}])
def test_gradients_reach_every_parameter(arguments: dict[str, Any]):
    network, text = decoder(**arguments), torch.arange(VOCAB)[None]
    network.losses(text, text.flip(1))[0].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_loss_is_float32_and_0_at_ignored_targets():
    network, text = decoder().bfloat16(), tokens()
    targets = text.clone()
    targets[:, ::2] = IGNORE
    losses, auxiliary = network.losses(text, targets)
    assert losses.dtype == torch.float32
    assert losses.shape == (2, TIME)
    assert (losses[:, ::2] == 0).all()
    assert (losses[:, 1::2] > 0).all()
    assert auxiliary == 0


def test_the_untrained_decoder_predicts_nearly_uniformly():
    torch.manual_seed(0)
    text = torch.randint(65, (4, 33))
    loss = honest().losses(text[:, :-1], text[:, 1:])[0].mean()
    assert loss.item() == pytest.approx(torch.tensor(65.0).log().item(), abs=0.1)  # logits of deviation 0.02 * 128^0.5


def test_a_mixer_with_forward_alone_makes_the_decoder_stateless():
    network = decoder(block=partial(PreNormBlock, mixer=Counting, feed_forward=partial(SwiGLU, hidden=12)))
    assert not network.stateful
    assert decoder().stateful


@pytest.mark.parametrize(
    ("name", "arguments"), [("dim", {"dim": 0}), ("depth", {"depth": 0}), ("depth", {"depth": -3})]
)
def test_a_width_or_depth_below_1_is_named(name: str, arguments: dict[str, int]):
    with pytest.raises(ValueError, match=f"^{name}: "):
        decoder(**arguments)


def test_a_hidden_width_below_1_is_named():
    with pytest.raises(ValueError, match=r"^hidden: "):
        SwiGLU(Site(dim=8), hidden=0)


def test_swiglu_is_its_equation_and_as_large_as_a_feed_forward_of_four_times_the_dim():
    torch.manual_seed(0)
    made = SwiGLU(Site(dim=12)).double()
    assert abs(count(made) - 8 * 12 * 12) <= 3 * 12  # rounding of the hidden width
    gate, up = made.gate_up.weight.chunk(2)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    inside = (x @ gate.T) * (x @ gate.T).sigmoid() * (x @ up.T)
    context = Context(tokens(2, 3), torch.arange(3)[None], x)
    assert_close(made(x, context), inside @ made.down.weight.T, **SAME)
