"""Which tokens the audits feed to a network, how many at once, and where they cut a sequence."""

import math

import numpy as np
import torch
from torch import Tensor

from llmx.parts.parameter_count import count_parameters
from llmx.protocol import Network, Tokens

MAX_ROWS = 32
MAX_WORK = 1e10  # parameters times tokens in one pass


def token_budget(network: Network, most: int, work: float = MAX_WORK) -> int:
    """How many tokens one pass may have: fewer than `most` for a large network."""
    return min(most, int(work / max(count_parameters(network), 1)))


def random_windows(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tokens:
    """(L,) -> (rows, length): stretches of the text."""
    starts = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def chunk_boundaries(length: int, count: int) -> list[int]:
    """Positions below `length` that are multiples of usual chunk sizes: powers of two first, then multiples of 8, 10.

    Each position covers as many sizes as it can that the positions before it do not cover.
    """
    sizes = {size: 4 if size.bit_count() == 1 else 1 for size in range(2, length)}
    missing = {size: weight for size, weight in sizes.items() if weight > 1 or size % 8 == 0 or size % 10 == 0}
    found: list[int] = []
    for _ in range(count):
        weights = np.zeros(length, np.int64)
        for size, weight in missing.items():
            weights[size::size] += weight
        found.append(int(weights[1:].argmax()) + 1)
        missing = {size: weight for size, weight in missing.items() if found[-1] % size}
    return found


def largest_prime(limit: int) -> int:
    """The largest prime up to a limit; 1 below 2."""
    return next((n for n in range(limit, 1, -1) if all(n % k for k in range(2, math.isqrt(n) + 1))), 1)
