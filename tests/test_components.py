"""Every mixer and feed-forward of the collection, found by itself: the fast form is the naive loop over `step`.

A component has to work with its default arguments at dim 64.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any

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
    return Context(
        torch.randint(11, (batch, time), generator=generator),
        torch.arange(time).expand(batch, time),
        torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )


def placed(cls: type, site: Site) -> list[Any]:
    """The component at a site, after the one of layer 0 where that is another: it fills the context's store first."""
    sites = [site] if site.layer == 0 else [Site(dim=site.dim, depth=site.depth), site]
    return [perturbed(cls(site)) for site in sites]


def run(components: Sequence[Any], x: Tensor, made: Context) -> Tensor:
    """The output of the last component; the others only write into the context."""
    for lower in components[:-1]:
        with torch.no_grad():
            lower(x, made)
    return components[-1](x, made)


def run_in_pieces(components: Sequence[Any], x: Tensor, lengths: Sequence[int]) -> Tensor:
    whole, outputs = context(x), []
    states = [component.init_state(x.shape[0], x.shape[1]) for component in components]
    for piece in pieces(lengths):
        single = piece.stop - piece.start == 1
        here, x_here = (whole.at(piece.start), x[:, piece.start]) if single else (whole.at(piece), x[:, piece])
        for i, component in enumerate(components):
            advance = component.step if single else component.prefill
            with torch.set_grad_enabled(i == len(components) - 1):
                output, states[i] = advance(x_here, states[i], here)
        outputs.append(output[:, None] if single else output)
    return torch.cat(outputs, 1)


def test_the_collection_is_found():
    assert {"Attention", "SwiGLU"} <= {cls.__name__ for cls in COMPONENTS}


@pytest.mark.parametrize("site", SITES, ids=["first", "later"])
@pytest.mark.parametrize("cls", STATEFUL, ids=lambda cls: cls.__name__)
def test_every_segmentation_is_the_forward_form_in_outputs_and_gradients(cls, site):
    torch.manual_seed(0)
    components = placed(cls, site)
    for time in (1, 2, 7, 19, 70):
        x = torch.randn(2, time, DIM, dtype=torch.float64, requires_grad=True)
        for lengths in segmentations(time):
            assert_same_outputs_and_gradients(
                components[-1],
                [x],
                lambda x=x: run(components, x, context(x)),
                lambda x=x, n=lengths: run_in_pieces(components, x, n),
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
        components = [component.train() for component in placed(cls, site)]
        x = torch.randn(2, 12, DIM, dtype=torch.float64, requires_grad=True)
        made = context(x)
        (run(components, x, made).square().sum() + made.auxiliary).backward()
        for name, parameter in components[-1].named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("cls", COMPONENTS, ids=lambda cls: cls.__name__)
def test_a_module_says_what_it_is_and_where_it_comes_from(cls):
    assert cls.__doc__
    assert len(inspect.getmodule(cls).__doc__) > 60
