"""A permutation that is computed, not stored: where index i of [0, size) goes, for any i, in any order.

A Feistel network is a bijection of the numbers of 2w bits, whatever its round function (Luby and Rackoff, SIAM J.
Comput. 17(2), 1988). A number outside [0, size) passes again until it falls inside, which makes a bijection of
[0, size) (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). With the smallest w
there are fewer than 4 * size such numbers for size > 1, so an index takes fewer than 4 passes on average. The round
function is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): quick and thorough, but no cryptography.
"""

import numpy as np

ROUNDS = 8


def permuted(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where the permutation of [0, size) with this key sends some indices: (N,) -> (N,) int64, with memory O(N).

    The size is at most 2**62. A key has integers that are not negative; each key gives another permutation.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.random.default_rng(key).integers(2**64, size=ROUNDS, dtype=np.uint64)
    image = _feistel(index.astype(np.uint64), half, keys)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], half, keys)
    return image.astype(np.int64)


def _feistel(number: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = number >> half, number & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(number: np.ndarray) -> np.ndarray:
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))
