"""The delta rule as the papers write it. Mixers have to agree with it in outputs, memory and gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.forms import assert_same_outputs_and_gradients, perturbed
from tests.parity import context


def naive(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token at a time, with the transition as a (K, K) matrix.

    query, key and log_decay (B, T, H, K), value (B, T, H, V), beta (B, T, H), state (B, H, K, V)
    -> (B, T, H, V), and the state.
    """
    outputs = []
    one = torch.eye(key.shape[-1], dtype=key.dtype)
    for t in range(key.shape[1]):
        k = key[:, t, :, :, None]
        b = beta[:, t, :, None, None]
        state = (one - b * k @ k.mT) @ torch.diag_embed(log_decay[:, t].exp()) @ state + b * k @ value[:, t, :, None]
        outputs.append((query[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1), state


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """silu(conv(x)): (B, T, D), taps (w, D) -> (B, T, D)."""
    padded = F.pad(x.transpose(1, 2), (len(taps) - 1, 0))
    return F.silu(F.conv1d(padded, taps.t()[:, None], groups=taps.shape[1])).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def normed(x: Tensor, norm: Any) -> Tensor:
    """An RMSNorm, written out."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def assert_is_the_paper(mixer: Any, paper: Callable[[Any, Tensor], tuple[Tensor, Tensor]], dim: int, time: int) -> None:
    """`paper` maps the mixer and x (B, T, D) to outputs and memory. `forward` and `prefill` have to agree with it."""
    mixer = perturbed(mixer)
    x = torch.randn(2, time, dim, dtype=torch.float64, requires_grad=True)

    def joined(outputs: Tensor, memory: Tensor) -> Tensor:
        return torch.cat((outputs.flatten(1), memory.flatten(1)), 1)

    def prefilled() -> Tensor:
        outputs, state = mixer.prefill(x, mixer.init_state(2, time), context(x))
        return joined(outputs, state.memory)

    assert_same_outputs_and_gradients(mixer, [x], lambda: joined(*paper(mixer, x)), prefilled)
    assert_same_outputs_and_gradients(mixer, [x], lambda: paper(mixer, x)[0], lambda: mixer(x, context(x)))
