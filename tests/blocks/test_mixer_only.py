import torch
from torch.testing import assert_close

from llmx.blocks.mixer_only import MixerOnlyBlock
from llmx.mixers.mingru import MinGRU
from llmx.protocol import Site
from tests.forms import SAME, assert_same_outputs_and_gradients, perturbed
from tests.parity import context


def test_a_block_adds_its_mixer_of_the_norm_in_every_form():
    block = perturbed(MixerOnlyBlock(Site(dim=6), MinGRU))
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert_close(block(x, context(x)), x + block.mixer(block.norm(x), context(x)), **SAME)

    def in_pieces():
        first, state = block.prefill(x[:, :4], block.init_state(2, 5), context(x[:, :4]))
        last, _ = block.step(x[:, 4], state, context(x).at(4))
        return torch.cat((first, last[:, None]), 1)

    assert_same_outputs_and_gradients(block, [x], lambda: block(x, context(x)), in_pieces)


def test_every_parameter_of_a_block_has_a_gradient():
    block = perturbed(MixerOnlyBlock(Site(dim=6), MinGRU))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    block(x, context(x)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())


def test_dropout_is_for_training_alone_and_leaves_the_stream():
    block = MixerOnlyBlock(Site(dim=6), MinGRU, dropout=1.0)
    x = torch.randn(2, 5, 6)
    assert_close(block.train()(x, context(x)), x)
    assert not torch.equal(block.eval()(x, context(x)), x)
