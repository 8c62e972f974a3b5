"""Attention: its recurrence and its parallel form, its positions, its cache."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.mixers.attention import Attention
from llmx.protocol import Context, Site

SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def attention(heads: int = 4, kv_heads: int | None = 2, dropout: float = 0.0) -> Attention:
    torch.manual_seed(0)
    made = Attention(Site(dim=16), heads=heads, kv_heads=kv_heads, dropout=dropout).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def context(batch: int, time: int, shift: int = 0, stride: int = 1) -> Context:
    positions = shift + stride * torch.arange(time)[None]
    return Context(torch.zeros(batch, time, dtype=torch.int64), positions, torch.zeros(batch, time, 16))


def stream(batch: int = 2, time: int = 7) -> Tensor:
    return torch.randn(batch, time, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, None), (4, 4), (4, 2), (4, 1), (1, 1), (8, 2)])
def test_step_is_the_equation_that_forward_computes(heads: int, kv_heads: int | None):
    mixer, x, whole = attention(heads, kv_heads), stream(), context(2, 7)
    state, outputs = mixer.init_state(2, 7), []
    for t in range(7):
        output, state = mixer.step(x[:, t], state, whole.at(t))
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), mixer(x, context(2, 7)), **SAME)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_forward_is_the_equation_of_the_paper(kv_heads: int):
    """One query, one head at a time, rotary pairs as complex numbers."""
    mixer, x, width = attention(4, kv_heads), stream(1, 5), 4
    query, key, value = mixer.qkv(x)[0].split((16, kv_heads * width, kv_heads * width), -1)
    angles = torch.tensor([10000.0 ** (-i / (width // 2)) for i in range(width // 2)], dtype=torch.float64)

    def turned(vector: Tensor, position: int) -> Tensor:
        return torch.complex(vector[: width // 2], vector[width // 2 :]) * torch.polar(
            torch.ones_like(angles), position * angles
        )

    rows = []
    for t in range(5):
        outputs = []
        for h in range(4):
            group = h // (4 // kv_heads)
            columns = slice(group * width, (group + 1) * width)
            q = turned(query[t, h * width : (h + 1) * width], t)
            scores = torch.stack([(q * turned(key[s, columns], s).conj()).real.sum() for s in range(t + 1)]) / 2
            outputs.append(scores.softmax(0) @ value[: t + 1, columns])
        rows.append(mixer.out(torch.cat(outputs)))
    assert_close(mixer(x, context(1, 5))[0], torch.stack(rows), **SAME)


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_shifting_all_positions_leaves_attention_unchanged(shift: int):
    mixer, x = attention(), stream()
    assert_close(mixer(x, context(2, 7, shift)), mixer(x, context(2, 7)), **SAME)


def test_stretching_the_distances_changes_attention():
    mixer, x = attention(), stream()
    assert (mixer(x, context(2, 7, stride=3)) - mixer(x, context(2, 7))).abs().max() > 1e-2


def test_each_row_can_have_its_own_positions():
    mixer, x = attention(), stream()
    own = Context(torch.zeros(2, 7, dtype=torch.int64), torch.stack((torch.arange(7), 3 * torch.arange(7))), x)
    expected = torch.cat((mixer(x[:1], context(1, 7)), mixer(x[1:], context(1, 7, stride=3))))
    assert_close(mixer(x, own), expected, **SAME)


def test_layers_share_the_rotary_table_only_where_it_is_the_same():
    x = stream()
    narrow, wide, other_base = attention(8, 8), attention(2, 2), Attention(Site(dim=16), rotary_base=50.0).double()
    shared = context(2, 7)
    for mixer in (narrow, wide, other_base, narrow):
        assert_close(mixer(x, shared), mixer(x, context(2, 7)), **SAME)


@pytest.mark.parametrize("method", ["step", "prefill"])
def test_the_state_is_written_in_place_while_gradients_are_off_and_only_then(method: str):
    mixer, x = attention(), stream()

    def run(state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if method == "step":
            return mixer.step(x[:, 0], state, context(2, 7).at(0))
        return mixer.prefill(x, state, context(2, 7))

    start = mixer.init_state(2, 9)
    first, after = run(start)
    assert start.key.abs().max() == 0
    assert start.value.abs().max() == 0
    again, _ = run(start)
    assert torch.equal(first, again)
    with torch.no_grad():
        output, written = run(start)
    assert torch.equal(output, first)
    assert written.key.data_ptr() == start.key.data_ptr()
    assert written.value.data_ptr() == start.value.data_ptr()
    assert torch.equal(written.key, after.key)


def test_room_that_is_not_used_does_not_matter():
    mixer, x = attention(), stream()
    tight, _ = mixer.prefill(x, mixer.init_state(2, 7), context(2, 7))
    roomy, _ = mixer.prefill(x, mixer.init_state(2, 50), context(2, 7))
    assert_close(roomy, tight, **SAME)


def test_the_state_has_two_numbers_a_key_head_channel_and_slot():
    state = attention(4, 2).init_state(3, 10)
    assert state.key.shape == state.value.shape == (3, 2, 10, 4)
    assert state.key.dtype == torch.float64


def test_dropout_acts_on_the_weights_in_training_only():
    mixer, x = attention(dropout=0.5), stream()
    plain = attention(dropout=0.0)(x, context(2, 7))
    assert not torch.allclose(mixer.train()(x, context(2, 7)), plain)
    assert torch.equal(mixer.eval()(x, context(2, 7)), plain)


@pytest.mark.parametrize("heads", [0, -2, 3, 5, 16, 32])
def test_heads_that_do_not_divide_the_dim_into_even_parts_are_named(heads: int):
    with pytest.raises(ValueError, match=r"^heads: .*dim 16"):
        Attention(Site(dim=16), heads=heads)


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8])
def test_kv_heads_that_do_not_divide_the_heads_are_named(kv_heads: int):
    with pytest.raises(ValueError, match=r"^kv_heads: .*heads 4"):
        Attention(Site(dim=16), heads=4, kv_heads=kv_heads)


def test_the_output_projection_starts_smaller_in_a_deeper_stack():
    torch.manual_seed(0)
    for depth in (1, 8):
        mixer = Attention(Site(dim=256, depth=depth))
        assert mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)  # 65,536 draws and more: 0.3 % error
        assert mixer.out.weight.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.02)
