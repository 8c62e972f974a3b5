"""Optimizers beside torch's own, and how parameters are grouped for an optimizer."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from llmx.protocol import Block, Component, Network
from llmx.training.hardware import native_bf16


def parameter_groups(network: Network, decayed: Literal["matrices", "all"]) -> list[dict[str, Any]]:
    """Every trainable parameter of a network, once, in up to three groups that an optimizer takes.

    The `hidden` group holds the weights of the linear layers (`nn.Linear`) in the blocks: orthogonalising optimizers
    are made for these. Embedding, head, gains, biases, kernels of convolutions and experts are in the others. A
    parameter that is not `decayed` is in a group with a weight decay of 0.
    """
    parts = [part for part in network.modules() if isinstance(part, Component)]
    excepted = {part.get_parameter(name) for part in parts for name in part.undecayed}
    layers = [layer for part in parts if isinstance(part, Block) for layer in part.modules()]
    linear = {layer.weight for layer in layers if isinstance(layer, nn.Linear)}
    hidden: dict[str, Any] = {"params": [], "hidden": True}
    matrices: dict[str, Any] = {"params": [], "hidden": False}
    others: dict[str, Any] = {"params": [], "hidden": False} | ({"weight_decay": 0.0} if decayed == "matrices" else {})
    for parameter in network.parameters():
        if parameter.requires_grad:
            outside = parameter.ndim < 2 or parameter in excepted
            group = others if outside else hidden if parameter in linear else matrices
            group["params"].append(parameter)
    return [group for group in (hidden, matrices, others) if group["params"]]


class Hybrid(Optimizer):
    """Two optimizers as one: the first for the linear layers of the blocks, the second for all other parameters.

    Raises ValueError for a network without linear layers in blocks.

    Args:
        params: groups as `parameter_groups` makes them.
        hidden: factory of the optimizer of the `hidden` groups.
        rest: factory of the optimizer of the others.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        hidden: Callable[[Iterable], Optimizer],
        rest: Callable[[Iterable], Optimizer] = AdamW,
    ):
        groups = list(params)
        of_hidden = [group for group in groups if group["hidden"]]
        if not of_hidden:
            raise ValueError("hidden: the network has no linear layers in blocks")
        self.parts = (hidden(of_hidden), rest([group for group in groups if not group["hidden"]]))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Makes the two optimizers use this one's groups and state, the same objects."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _evaluated(closure)
        for part in self.parts:
            part.step()
        return loss


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that trains one set of weights and evaluates another, such as schedule-free AdamW
    (arXiv 2405.15682). Its `eval` exchanges the first for the second, its `train` changes them back."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    return optimizer.parts if isinstance(optimizer, Hybrid) else (optimizer,)


def set_mode(optimizer: Optimizer, training: bool) -> None:
    """Exchanges the weights of an averaging optimizer; does nothing to others."""
    for part in parts_of(optimizer):
        if isinstance(part, Averaging):
            part.train() if training else part.eval()


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The configured values of each group, without what the optimizer itself keeps there, such as a count of steps."""
    return [
        {key: group[key] for key in inspect.signature(type(part)).parameters if key in group and key != "params"}
        for part in parts_of(optimizer)
        for group in part.param_groups
    ]


class BatchedMuon(torch.optim.Muon):
    """Momentum, orthogonalised (Jordan 2024, kellerjordan.github.io/posts/muon; arXiv 2502.16982), for matrices.

        m <- mu m + (1 - mu) g,    W <- (1 - lr decay) W - lr r NewtonSchulz(mu m + (1 - mu) g),    r as `adjust_lr_fn`

    It differs from `torch.optim.Muon` in two points. Matrices of one shape are orthogonalised in one batch, and in bf16
    only if the device multiplies it natively. The trap: query, key and value from one projection are one matrix to it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _evaluated(closure)
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in of_shape.items():
                gradients = torch.stack([cast(Tensor, parameter.grad) for parameter in parameters])
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients.unbind(), 1 - group["momentum"])
                update = torch.stack(momenta)
                if group["nesterov"]:
                    update = gradients.lerp(update, group["momentum"])
                update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * _adjustment(group["adjust_lr_fn"], *shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, update.to(parameters[0].dtype).unbind(), alpha=-rate)
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(N, R, C) -> (N, R, C): brings the singular values of each matrix near 1 by Newton-Schulz iterations,
    X <- a X + (b X X^T + c (X X^T)^2) X, which start from X over its Frobenius norm."""
    a, b, c = coefficients
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.mT).to(torch.bfloat16 if native_bf16(x.device.type) else torch.float32)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    """Calls an optimizer's closure; its loss is what the step returns."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _adjustment(name: str | None, rows: int, columns: int) -> float:
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
