"""Addressed randomness: a draw is a function of (seed, stream, address) and of nothing else.

The address is a tuple of integers such as (iteration, group, sample, step). Because no generator is carried along, a
draw does not depend on the batch split, the number of processes, the device or the resumes before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor


class KeyedRNG:
    """Draws float32 and int64 CPU tensors by address; consumes no global generator.

    seed: any integer. A stream is a name for one use of randomness ("rollout", "order" ...): the same address in two
    streams gives independent draws. An address that is not made of integers raises TypeError.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(index(seed))

    def generator(self, stream: str, *address: int) -> np.random.Generator:
        """A fresh generator for this address."""
        # Integers hold no "|" and the stream comes last, so two addresses never give the same key.
        key = "|".join([str(int(index(number))) for number in (self.seed, *address)] + ["", stream])
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        # Philox is made for this: 128 bits of key, where torch's CPU generator keeps only 32 bits of a seed and would
        # most likely repeat itself among 100,000 addresses.
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, shape: Sequence[int], stream: str, *address: int) -> Tensor:
        """Standard normal numbers of this shape."""
        return self.normal_batch(shape, stream, [address])[0]

    def normal_batch(self, shape: Sequence[int], stream: str, addresses: Sequence[tuple[int, ...]]) -> Tensor:
        """(B, *shape): row i is ``normal(shape, stream, *addresses[i])``, whatever the other rows."""
        batch = np.empty((len(addresses), *shape), dtype=np.float32)
        for row, address in enumerate(addresses):
            batch[row] = self.generator(stream, *address).standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(batch)

    def permutation(self, n: int, stream: str, *address: int) -> Tensor:
        """(n,) int64: 0 to n - 1 in random order."""
        return torch.from_numpy(self.generator(stream, *address).permutation(n))
