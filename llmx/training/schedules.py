"""Learning-rate schedules: the factor on the optimizer's rates as a function of the step."""

import math

from llmx.protocol import Schedule


class Cosine(Schedule):
    """Linear warm-up, then half a cosine from 1 to `minimum_ratio`, reached when the last step is done
    (arXiv 1608.03983).

    Args:
        total_steps: optimizer steps in the run.
        warmup_steps: steps of the linear rise; the first step has 1 / (warmup_steps + 1).
        minimum_ratio: last rate over highest rate.

    Raises:
        ValueError: for a negative warm-up or a ratio outside [0, 1].
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0, minimum_ratio: float = 0.1):
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: {warmup_steps} is below 0")
        if not 0 <= minimum_ratio <= 1:
            raise ValueError(f"minimum_ratio: {minimum_ratio} is not in [0, 1]")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.minimum_ratio = minimum_ratio

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.minimum_ratio + (1 - self.minimum_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
