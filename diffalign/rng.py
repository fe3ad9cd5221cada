"""Keyed randomness: a draw is a function of (seed, stream, address) alone.

The address is a tuple of integers such as (iteration, group, sample, step). No generator state is kept, so a draw does
not depend on the batch split, the number of processes, the device or earlier resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor


class KeyedRNG:
    """Draw float32 and int64 CPU tensors by address, without global generators.

    seed: any integer. A stream is a name for one use of randomness ("rollout", "order" ...): the same address in two
    streams gives independent draws. An address that is not made of integers raises TypeError.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(index(seed))

    def generator(self, stream: str, *address: int) -> np.random.Generator:
        """Create a generator for an address."""
        # Integers hold no "|" and the stream comes last, so two addresses never give the same key.
        key = "|".join([str(int(index(number))) for number in (self.seed, *address)] + ["", stream])
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        # Philox is made for this: 128 bits of key, where torch's CPU generator keeps only 32 bits of a seed and would
        # most likely repeat itself among 100,000 addresses.
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, shape: Sequence[int], stream: str, *address: int) -> Tensor:
        """Draw standard normal numbers of a shape."""
        return self.normal_batch(shape, stream, [address])[0]

    def normal_batch(self, shape: Sequence[int], stream: str, addresses: Sequence[tuple[int, ...]]) -> Tensor:
        """Draw (B, *shape): row i is ``normal(shape, stream, *addresses[i])``, independent of the other rows."""
        batch = np.empty((len(addresses), *shape), dtype=np.float32)
        for row, address in enumerate(addresses):
            batch[row] = self.generator(stream, *address).standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(batch)

    def permutation(self, n: int, stream: str, *address: int) -> Tensor:
        """Draw a permutation of 0 to n - 1: (n,), int64."""
        return torch.from_numpy(self.generator(stream, *address).permutation(n))
