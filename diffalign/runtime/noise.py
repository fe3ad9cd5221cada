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

_WORDS = 624  # Of the Mersenne twister behind torch's CPU generator, 32 bits each.


def _words(state: Tensor) -> Tensor:
    """The twister's words inside ``Generator.get_state()``, as a view: after 24 bytes of counters, 8 bytes each."""
    return state[24 : 24 + 8 * _WORDS].view(torch.int64)


class Noise:
    """Draws float32 and int64 CPU tensors by address; consumes no global generator.

    seed: any integer. A stream is a name for one use of randomness ("rollout", "order" ...): the same address in two
    streams gives independent draws. An address that is not made of integers raises TypeError.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(index(seed))

    def generator(self, stream: str, *address: int) -> torch.Generator:
        """A fresh CPU generator for this address."""
        # Integers hold no "|" and the stream comes last, so two addresses never give the same key.
        key = "|".join([str(int(index(number))) for number in (self.seed, *address)] + ["", stream])
        generator = torch.Generator(device="cpu").manual_seed(0)
        state = generator.get_state()
        words = _words(state)
        assert words[:2].tolist() == [0, 1], "torch lays out its generator differently: adapt _words"
        # manual_seed keeps 32 bits of a seed: among 100,000 addresses two would most likely draw the same numbers.
        digest = hashlib.shake_256(key.encode()).digest(4 * _WORDS)
        words.copy_(torch.from_numpy(np.frombuffer(digest, "<u4").astype(np.int64)))
        return generator.set_state(state)

    def normal(self, shape: Sequence[int], stream: str, *address: int) -> Tensor:
        """Standard normal numbers of this shape."""
        generator = self.generator(stream, *address)
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")

    def normal_batch(self, shape: Sequence[int], stream: str, addresses: Sequence[tuple[int, ...]]) -> Tensor:
        """(B, *shape): row i is ``normal(shape, stream, *addresses[i])``, whatever the other rows."""
        batch = torch.empty((len(addresses), *shape), dtype=torch.float32, device="cpu")
        for row, address in enumerate(addresses):
            batch[row] = self.normal(shape, stream, *address)
        return batch

    def permutation(self, n: int, stream: str, *address: int) -> Tensor:
        """(n,) int64: 0 to n - 1 in random order."""
        return torch.randperm(n, generator=self.generator(stream, *address), device="cpu")

    def integers(self, low: int, high: int, shape: Sequence[int], stream: str, *address: int) -> Tensor:
        """Uniform int64 numbers in [low, high)."""
        return torch.randint(low, high, tuple(shape), generator=self.generator(stream, *address), device="cpu")
