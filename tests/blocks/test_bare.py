"""The block of the classical recurrent language model."""

from functools import partial

import torch
from torch.testing import assert_close

from llmx.blocks.bare import BareBlock
from llmx.mixers.lstm import LSTM
from llmx.protocol import Context, Mixer, Site


class Doubling(Mixer):
    def __init__(self, site: Site):
        super().__init__()

    def forward(self, x, context):
        return 2 * x


def context(x):
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def test_the_output_is_the_mixers_alone():
    x = torch.randn(2, 5, 4)
    assert_close(BareBlock(Site(dim=4), Doubling)(x, context(x)), 2 * x)


def test_dropout_is_for_training_and_for_the_whole_output():
    x = torch.ones(50, 5, 4)
    block = BareBlock(Site(dim=4), Doubling, dropout=0.5)
    assert set(block(x, context(x)).unique().tolist()) == {0.0, 4.0}
    assert_close(block.eval()(x, context(x)), 2 * x)


def test_it_has_a_recurrent_form_where_its_mixer_has_one():
    assert not BareBlock(Site(dim=4), Doubling).stateful
    block, x = BareBlock(Site(dim=4), partial(LSTM, forget_bias=2.0)), torch.randn(2, 5, 4)
    assert block.stateful
    first, state = block.prefill(x[:, :4], block.init_state(2, 5), context(x[:, :4]))
    last, _ = block.step(x[:, 4], state, context(x).at(4))
    assert_close(torch.cat((first, last[:, None]), 1), block(x, context(x)))
