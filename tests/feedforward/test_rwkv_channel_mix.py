"""RWKV's channel mix: its equation, and where its shift gets the token before from."""

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.feedforward.rwkv_channel_mix import RWKVChannelMix
from llmx.protocol import Context, Site

SAME = {"rtol": 1e-10, "atol": 1e-10}


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def made() -> tuple[RWKVChannelMix, Tensor]:
    torch.manual_seed(0)
    mix = RWKVChannelMix(Site(dim=6, layer=1, depth=3), hidden=24).double()
    nn.init.normal_(mix.down.weight)
    return mix, torch.randn(2, 7, 6).double()


def test_outputs_are_the_equation():
    mix, x = made()
    for t in range(7):
        before = x[:, t - 1] if t else torch.zeros(2, 6).double()
        shifted = mix.shift * before + (1 - mix.shift) * x[:, t]
        expected = (shifted @ mix.up.weight.T).clamp(min=0) ** 2 @ mix.down.weight.T
        assert_close(mix(x, context(x))[:, t], expected, **SAME)


def test_a_position_sees_itself_and_the_one_before_and_no_other():
    mix, x = made()
    seen = (
        torch.autograd.functional.jacobian(lambda x: mix(x, context(x)), x)[0, :, :, 0].abs().amax((1, 3)) > 0
    )  # (T, T)
    expected = torch.eye(7) + torch.ones(6).diag(-1)
    assert_close(seen.float(), expected)


def test_a_continued_text_sees_the_last_token_of_what_came_before():
    mix, x = made()
    first, state = mix.prefill(x[:, :3], mix.init_state(2, 7), context(x[:, :3]))
    second, state = mix.prefill(x[:, 3:6], state, context(x[:, 3:6]))
    last, state = mix.step(x[:, 6], state, context(x).at(6))
    assert_close(torch.cat((first, second, last[:, None]), 1), mix(x, context(x)), **SAME)
    assert_close(state.last, x[:, 6])


def test_it_starts_as_nothing():
    mix = RWKVChannelMix(Site(dim=6))
    x = torch.randn(1, 3, 6)
    assert not mix(x, context(x)).any()
