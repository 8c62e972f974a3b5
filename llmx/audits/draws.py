"""The random draws of an audit are the lab's: constants, which depend on no shape, no order and no earlier draw.

Two passes of a network are compared, so both have to draw the same. A seed is not enough: an expert drops out as many
numbers as it has tokens, which depends on later tokens, and all draws after it shift. So every draw is a quantile of
its distribution, at a level between 0 and 1. Dropout keeps what it keeps with a probability above the level.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DROPOUTS = (
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
)


class LabDraws(TorchFunctionMode):
    """Replaces what a network draws by torch, from any of its generators. The draws of numpy and Python stay, and those
    inside torch's larger modules (nn.MultiheadAttention, nn.LSTM): seed them."""

    def __init__(self, level: float):
        super().__init__()
        self.level = level
        self.normal = math.sqrt(2) * torch.erfinv(torch.tensor(2 * level - 1)).item()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in DROPOUTS:
            return self._dropout(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            return func(**{**named, **kwargs, "dropout_p": 0.0})
        output = func(*args, **kwargs)
        if name in ("multinomial", "randperm"):
            _choose(output, args[0])
        elif name in ("rand", "rand_like", "randn", "randn_like"):
            output.fill_(self.normal if "randn" in name else self.level)
        elif name in ("uniform_", "normal_", "normal", "exponential_", "bernoulli", "bernoulli_"):
            output.copy_(torch.as_tensor(self._quantile(name, args, kwargs)))
        elif name in ("randint", "randint_like", "random_"):
            names = ("low", "high", "from", "to")
            bounds = [x for x in (*args, *map(kwargs.get, names)) if isinstance(x, int)]
            low, high = bounds[:2] if len(bounds) > 1 else [0, *bounds, 1][:2]
            output.fill_(low + int(self.level * (high - low)))
        return output

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        kept = (1 / (1 - p) if 1 - p > self.level else 0.0) if training else 1.0
        return x.mul_(kept) if inplace else x * kept

    def _quantile(self, name: str, args: Any, kwargs: Any) -> Any:
        given: list[Any] = [*(args[1:] if name.endswith("_") else args)]
        given += [value for key, value in kwargs.items() if key != "generator"]
        if name == "uniform_":
            low, high = given + [0.0, 1.0][len(given) :]
            return low + self.level * (high - low)
        if name.startswith("normal"):
            mean, std = given[:2] + [0.0, 1.0][len(given) :]
            return mean + self.normal * std
        if name == "exponential_":
            return -math.log1p(-self.level) / (given[0] if given else 1.0)
        return torch.as_tensor(given[-1] if given else 0.5) > self.level


def _choose(output: Tensor, weights: Any) -> None:
    """Takes what is likeliest, or the order as it is."""
    order = torch.arange(output.shape[-1], device=output.device)
    if isinstance(weights, Tensor):
        ranked = weights.sort(dim=-1, descending=True, stable=True).indices
        order = ranked[..., order % ranked.shape[-1]]
    output.copy_(order)
