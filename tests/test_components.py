"""Every mixer and feed-forward of the collection, found by itself: the fast form is the naive loop over `step`.

A component has to work with its default arguments at dim 64.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import llmx.feedforward
import llmx.mixers
from llmx.audits.equivalence import segmentations
from llmx.protocol import Context, FeedForward, Mixer, Site, Stateful
from tests.forms import assert_same_outputs_and_gradients, perturbed, pieces

DIM = 64


def found(package) -> list[type]:
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return [
        cls
        for module in modules
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Mixer | FeedForward) and cls.__module__ == module.__name__ and not inspect.isabstract(cls)
    ]


COMPONENTS = [*found(llmx.mixers), *found(llmx.feedforward)]
STATEFUL = [cls for cls in COMPONENTS if issubclass(cls, Stateful)]
SITES = [Site(dim=DIM), Site(dim=DIM, layer=2, depth=4, occurrence=1)]


def context(x: Tensor) -> Context:
    batch, time = x.shape[:2]
    generator = torch.Generator().manual_seed(3)
    made = Context(
        torch.randint(11, (batch, time), generator=generator),
        torch.arange(time).expand(batch, time),
        torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )
    made.store["first value"] = torch.randn(x.shape, generator=generator, dtype=x.dtype)  # what layer 0 leaves there
    made.store["first value of RWKV-7"] = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    made.store["hgrn2 bounds"] = torch.linspace(0, 0.9, 4, dtype=x.dtype)[:, None].expand(1, time, 4, DIM)
    return made


def run_in_pieces(component, x: Tensor, lengths: Sequence[int]) -> Tensor:
    whole, outputs = context(x), []
    state = component.init_state(x.shape[0], x.shape[1])
    for piece in pieces(lengths):
        here = Context(whole.tokens[:, piece], whole.positions[:, piece], whole.embedding[:, piece])
        here.store = {name: value[:, piece] for name, value in whole.store.items()}
        if piece.stop - piece.start == 1:
            output, state = component.step(x[:, piece.start], state, here.at(0))
            outputs.append(output[:, None])
        else:
            output, state = component.prefill(x[:, piece], state, here)
            outputs.append(output)
    return torch.cat(outputs, 1)


def test_the_collection_is_found():
    assert {"Attention", "SwiGLU"} <= {cls.__name__ for cls in COMPONENTS}


@pytest.mark.parametrize("site", SITES, ids=["first", "later"])
@pytest.mark.parametrize("cls", STATEFUL, ids=lambda cls: cls.__name__)
def test_every_segmentation_is_the_forward_form_in_outputs_and_gradients(cls, site):
    torch.manual_seed(0)
    component = perturbed(cls(site))
    for time in (1, 2, 7, 19, 70):
        x = torch.randn(2, time, DIM, dtype=torch.float64, requires_grad=True)
        for lengths in segmentations(time):
            assert_same_outputs_and_gradients(
                component,
                [x],
                lambda x=x: component(x, context(x)),
                lambda x=x, n=lengths: run_in_pieces(component, x, n),
            )


@pytest.mark.parametrize("cls", STATEFUL, ids=lambda cls: cls.__name__)
def test_the_state_has_the_batch_first_and_is_made_of_tensors(cls):
    component = cls(SITES[0])
    for leaf in torch.utils._pytree.tree_leaves(component.init_state(3, 5)):
        assert isinstance(leaf, Tensor)
        assert leaf.shape[0] == 3


@pytest.mark.parametrize("cls", COMPONENTS, ids=lambda cls: cls.__name__)
def test_every_parameter_has_a_gradient(cls):
    for site in SITES:
        component = perturbed(cls(site)).train()
        x = torch.randn(2, 12, DIM, dtype=torch.float64, requires_grad=True)
        made = context(x)
        (component(x, made).square().sum() + made.auxiliary).backward()
        for name, parameter in component.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("cls", COMPONENTS, ids=lambda cls: cls.__name__)
def test_a_module_says_what_it_is_and_where_it_comes_from(cls):
    assert cls.__doc__
    assert len(inspect.getmodule(cls).__doc__) > 60
