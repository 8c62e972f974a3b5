"""Learning-rate schedules: the factor on the optimizer's rates as a function of the step.

They raise ValueError for a negative warm-up, or a share or ratio outside [0, 1].
"""

import math

from llmx.protocol import Schedule


class Cosine(Schedule):
    """Linear warm-up, then half a cosine from 1 to `minimum_ratio` at the end of the last step (arXiv 1608.03983).

    Args:
        total_steps: optimizer steps in the run.
        warmup_steps: steps of the linear rise; the first step has 1 / (warmup_steps + 1).
        minimum_ratio: last rate over highest rate.
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0, minimum_ratio: float = 0.1):
        _check(warmup_steps, minimum_ratio=minimum_ratio)
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.minimum_ratio = minimum_ratio

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return _rise(step, self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.minimum_ratio + (1 - self.minimum_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """Linear warm-up, then 1, then linearly down to `minimum_ratio`, reached when the last step is done
    (arXiv 2404.06395; 2405.18392 on linear decay).

    Args:
        total_steps: optimizer steps in the run.
        warmup_steps: steps of the linear rise; the first step has 1 / (warmup_steps + 1).
        decay: the last share of the run, in which the rate falls; with 0 it never falls.
        minimum_ratio: last rate over highest rate.
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0, decay: float = 0.2, minimum_ratio: float = 0.0):
        _check(warmup_steps, decay=decay, minimum_ratio=minimum_ratio)
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.decay_steps = decay * total_steps
        self.minimum_ratio = minimum_ratio

    def __call__(self, step: int) -> float:
        left = max(0, self.total_steps - step)
        falling = 1.0
        if left < self.decay_steps:
            falling = self.minimum_ratio + (1 - self.minimum_ratio) * left / self.decay_steps
        return min(falling, _rise(step, self.warmup_steps))


def _rise(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _check(warmup_steps: int, **ratios: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: {warmup_steps} is below 0")
    for name, ratio in ratios.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}: {ratio} is not in [0, 1]")
