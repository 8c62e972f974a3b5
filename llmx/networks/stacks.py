"""How the blocks of a decoder are wired."""

from collections.abc import Sequence

from torch import Tensor

from llmx.protocol import Run, Stack


class Sequential(Stack):
    """One block after the other."""

    def forward(self, x: Tensor, runs: Sequence[Run]) -> Tensor:
        for run in runs:
            x = run(x)
        return x
