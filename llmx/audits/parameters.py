"""The parameter audit: a gradient reaches every parameter, and the loss starts near that of uniform guessing.

A parameter without a gradient is dead weight that a comparison still counts, and DDP refuses it. The trap: a projection
that starts at zero hides everything behind it, so the audit moves the weights first.
"""

import math
import time
from dataclasses import dataclass

import torch

from llmx.audits.network_copies import exact_copy, perturbed_copy, preserve_rng_state, seed_cpu
from llmx.protocol import Network

ROWS = 8
TOO_HIGH = 1.0  # nats above ln V: beyond, a head or embedding starts too large


@dataclass(frozen=True)
class ParametersReport:
    """What the parameter audit found."""

    silent: tuple[str, ...]  # names of the parameters that no gradient reaches
    initial_loss: float  # nats, of the initialised network on random tokens
    uniform_loss: float  # ln V
    seconds: float

    @property
    def starts_high(self) -> bool:
        return not self.initial_loss < self.uniform_loss + TOO_HIGH

    @property
    def failing(self) -> bool:
        return bool(self.silent) or self.starts_high

    def summary(self) -> str:
        """One line for people."""
        reached = f"NO GRADIENT reaches {', '.join(self.silent)}" if self.silent else "a gradient reaches every one"
        start = f"on random tokens the loss is {self.initial_loss:.3f}, ln V is {self.uniform_loss:.3f}"
        return f"parameters: {self.seconds:.1f} s: {reached}; {start}{': TOO HIGH' if self.starts_high else ''}."


def audit_parameters(network: Network, max_length: int, seed: int = 0) -> ParametersReport:
    """Looks for parameters without a gradient, and for an initial loss far above ln V.

    The network has its initial weights, and may be in any mode and on any device. It and the caller's random state stay
    as they are. Of the window, `max_length`, the audit tries at most 32 tokens. `seed` seeds weights and tokens.
    """
    started = time.perf_counter()
    with preserve_rng_state():
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(network.vocab_size, (ROWS, min(max_length, 32) + 1), generator=generator)
        tokens, targets = text[:, :-1], text[:, 1:]
        with torch.no_grad():
            exact = exact_copy(network).eval()
            initial = exact.losses(tokens, targets)[0].mean().item()
            moved = perturbed_copy(exact, 0.1, generator)
        names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        trained = {name: weight.requires_grad_(True) for name, weight in moved.named_parameters() if name in names}
        seed_cpu(seed)
        losses, auxiliary = moved.train().losses(tokens, targets)
        if trained:
            (losses.double().mean() + auxiliary).backward()
    silent = [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()]
    return ParametersReport(tuple(silent), initial, math.log(network.vocab_size), time.perf_counter() - started)
