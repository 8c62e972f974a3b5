"""Draws, during training, what each mixer looks at in a fixed sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from llmx.audits.network_copies import copy_network, preserve_rng_state
from llmx.errors import UserError
from llmx.protocol import Network
from llmx.training.lightning_types import Model, attributes, language_model
from llmx.training.logger import validated_board

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LENGTH = 32  # tokens of the sentence, where none is given
DRAWS = 8
COLUMNS = 4


class MixerMap(NamedTuple):
    """What the outputs of one call of a mixer depend on.

    title:   the layer's number and the mixer's class
    shares:  (T, T), row t: how strongly the output at t depends on each input; rows sum to 1, or are 0
    """

    title: str
    shares: Tensor


class MixerMaps(Callback):
    """`maps/mixers` at every validation: a map for each layer, like a map of attention weights, but for any mixer.

    Args:
        sentence: what the network reads, at most a window long; the beginning of the validation split if not given.
    """

    def __init__(self, sentence: str = ""):
        self.sentence = sentence

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.check(language_model(pl_module))

    def check(self, model: Model) -> None:
        """Raises UserError for a sentence too long or outside the vocabulary, and for a network without layers."""
        if not model.network.layers:
            name = type(model.network).__name__
            raise UserError(f"trainer.callbacks: MixerMaps draws the mixers of layers, and {name} has no layers")
        try:
            length = len(model.tokenizer.encode(self.sentence))
        except UserError as error:
            raise UserError(f"trainer.callbacks.sentence: {error}") from error
        if length > model.window:
            raise UserError(f"trainer.callbacks.sentence: {length} tokens, and the window has {model.window}")

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        board, model = validated_board(trainer), language_model(pl_module)
        if board is None:
            return
        if self.sentence:
            text = model.tokenizer.encode(self.sentence)
        else:
            text = np.array(attributes(trainer).datamodule.tokens("val")[: min(LENGTH, model.window)])
        tokens = torch.from_numpy(text).long()
        maps = mixer_maps(model.network, tokens.to(model.device))
        labels = [_label(model.tokenizer.decode([token])) for token in tokens.tolist()]
        board.add_figure("maps/mixers", maps_figure(maps, labels), trainer.global_step - 1)  # where val/loss is


def mixer_maps(network: Network, tokens: Tensor) -> list[MixerMap]:
    """One map for each call of a mixer, from the bottom layer to the top, for one sequence, tokens (T,).

    Row t is, over s, the norm of d output_t / d input_s: the mixer's own output by its own input. For attention this is
    close to its weights, for a recurrence to what its state has kept. Gradients of a few random projections of the
    output estimate the Frobenius norm. It works on a copy in evaluation mode; the network and the caller's random state
    stay as they are.
    """
    network = copy_network(network).eval().requires_grad_(False)
    read: list[Tensor] = []
    calls: list[tuple[str, Tensor, Tensor]] = []  # title, input, output

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(args[0].detach().requires_grad_())  # detached from the layers below
        return (read[-1].clone(), *args[1:])  # the mixer may write in place

    for index, block in enumerate(network.layers):
        title = f"layer {index}, {type(block.mixer).__name__}"

        def after(module: nn.Module, args: Any, output: Tensor, title: str = title) -> None:
            calls.append((title, read[-1], output))

        block.mixer.register_forward_pre_hook(before)
        block.mixer.register_forward_hook(after)
    with preserve_rng_state(), torch.enable_grad():
        network(tokens.repeat(len(tokens), 1))  # row t serves the output at t
        return [MixerMap(title, _shares(inputs, outputs)) for title, inputs, outputs in tuple(calls)]


def _shares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The map of one call, inputs and outputs (T, T, D); row t is asked for its output at t."""
    own = outputs.diagonal(dim1=0, dim2=1).T  # (T, D)
    squares = torch.zeros(inputs.shape[:2])
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS if own.requires_grad else 0):
        projection = torch.randn(own.shape, generator=generator).to(own)
        (gradient,) = torch.autograd.grad((own * projection).sum(), inputs, retain_graph=True)
        squares += gradient.square().sum(-1).float().cpu()
    norms = squares.sqrt()
    return norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)


def maps_figure(maps: list[MixerMap], labels: list[str]) -> Figure:
    """Draws the maps beside each other, with a label for each token, on one scale: the root of the share."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    rows = math.ceil(len(maps) / COLUMNS)
    columns = min(COLUMNS, len(maps))
    figure = Figure(figsize=(3.4 * columns, 3.5 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    ticks = range(len(labels))
    for axes, (title, shares) in zip(panels, maps, strict=False):
        axes.imshow(shares.nan_to_num(), norm=PowerNorm(0.5, 0, 1), cmap="viridis")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(ticks, labels, fontsize=6, family="monospace")
        axes.set_yticks(ticks, labels, fontsize=6, family="monospace")
        axes.tick_params(length=0)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    figure.supxlabel("input", fontsize=9)
    figure.supylabel("output", fontsize=9)
    return figure


def _label(text: str) -> str:
    """A token as a tick, with its whitespace visible."""
    return text.translate({ord(" "): "␣", ord("\n"): "↵", ord("\t"): "→"}).replace("$", r"\$")
