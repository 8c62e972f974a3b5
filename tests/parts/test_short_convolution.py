"""The short convolution against conv1d, and what it sees when a text goes on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from llmx.parts.short_convolution import ShortConvolution

SAME = {"rtol": 1e-12, "atol": 1e-12}


def made(width: int, bias: bool = True) -> ShortConvolution:
    torch.manual_seed(0)
    convolution = ShortConvolution(5, width, bias).double()
    for parameter in convolution.parameters():
        nn.init.normal_(parameter)
    return convolution


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_padded_and_cut_conv1d(width: int, bias: bool):
    convolution, x = made(width, bias), torch.randn(2, 7, 5).double()
    weight = convolution.taps.T[:, None]  # (D, 1, w)
    expected = F.conv1d(x.mT, weight, convolution.bias, padding=width - 1, groups=5)[..., :7].mT
    assert_close(convolution(x), expected, **SAME)


@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_a_text_in_pieces_is_the_text_as_one(width: int):
    convolution, x = made(width), torch.randn(2, 9, 5).double()
    state, outputs = convolution.init_state(2), []
    for piece in x.split((3, 2, 4), 1):
        output, state = convolution.prefill(piece, state)
        outputs.append(output)
    assert_close(torch.cat(outputs, 1), convolution(x), **SAME)
    state, outputs = convolution.init_state(2), []
    for t in range(9):
        output, state = convolution.step(x[:, t], state)
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), convolution(x), **SAME)
    assert state.shape == (2, width - 1, 5)


def test_a_position_sees_as_many_tokens_as_the_convolution_is_wide():
    convolution = made(3)
    x = torch.randn(1, 6, 5, dtype=torch.float64, requires_grad=True)
    for t in range(6):
        gradient = torch.autograd.grad(convolution(x)[0, t].sum(), x)[0][0].abs().sum(-1)
        assert [s for s in range(6) if gradient[s] > 0] == list(range(max(0, t - 2), t + 1))


def test_a_width_below_one_is_named():
    with pytest.raises(ValueError, match=r"^width: "):
        ShortConvolution(5, 0)
