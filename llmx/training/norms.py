"""Gradient and weight norms by layer, to find the layer where training goes wrong."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from llmx.protocol import Network
from llmx.training.lightning_types import language_model, logs_this_step

NORMS_LAYOUT = {
    "norms by layer": {"gradients": ["Multiline", ["^gradient_norm/"]], "weights": ["Multiline", ["^weight_norm/"]]}
}


class NormsByLayer(Callback):
    """`gradient_norm/` and `weight_norm/` at every log: a curve for each layer, and for each part outside the layers
    (embedding, norm, head). Each is the Euclidean norm over all numbers of a part. Gradients are of the whole batch,
    before clipping."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not logs_this_step(trainer):
            return
        norms = {}
        for name, parameters in parts(language_model(pl_module).network).items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms[f"gradient_norm/{name}"] = get_total_norm(gradients)
            norms[f"weight_norm/{name}"] = get_total_norm([parameter.detach() for parameter in parameters])
        pl_module.log_dict(norms, rank_zero_only=True)


def parts(network: Network) -> dict[str, list[Parameter]]:
    """The parameters by layer (`layer_0`) and, outside the layers, by the network's parts; each once."""
    layers = {id(p): f"layer_{i}" for i, block in enumerate(network.layers) for p in block.parameters()}
    named: dict[str, list[Parameter]] = {}
    for name, parameter in network.named_parameters():
        named.setdefault(layers.get(id(parameter), name.split(".")[0]), []).append(parameter)
    return named
