"""Aspect-ratio buckets: training sizes of nearly equal area, and batches of images of one size.

Each image belongs to the bucket that cuts the least of it. Which images an iteration takes, and of which bucket, is a
pure function of its number, as in ``epoch_order``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from torch import Tensor

from diffalign import media
from diffalign.data.epoch_order import take
from diffalign.structures import LabelledImage, Pair

Size = tuple[int, int]  # (height, width)
Permutation = Callable[..., Tensor]  # (count, stream, *address) -> (count,)
MAX_RATIO = 4  # of the sides of a bucket, as for SDXL (arXiv 2307.01952, table 5)


def bucket_sizes(base: Size, step: int, usable: Callable[[Size], bool] = lambda size: True) -> tuple[Size, ...]:
    """List the sizes of buckets: ``base``, and for each height the greatest width that keeps the area.

    Args:
        base: (height, width) of the configured resolution, whose area no bucket exceeds.
        step: Sides of the other buckets are multiples of it, in pixels.
        usable: Whether the model can generate a size.
    """
    area, found = base[0] * base[1], [base]
    for height in range(step, math.isqrt(area * MAX_RATIO) + 1, step):
        size = height, area // height // step * step
        if size[1] and max(size) <= MAX_RATIO * min(size) and size not in found and usable(size):
            found.append(size)
    return tuple(found)


def kept_share(image: Size, bucket: Size) -> Fraction:
    """Return the share of an image of (height, width) that is left by a crop to the aspect ratio of a bucket."""
    ratio = Fraction(image[0] * bucket[1], image[1] * bucket[0])
    return min(ratio, 1 / ratio)


def nearest_bucket(images: Sequence[Size], buckets: Sequence[Size]) -> int:
    """Return the index of the bucket that cuts the least of all images; of equal ones the greatest, then the first."""
    return max(
        range(len(buckets)),
        key=lambda b: (sum(kept_share(i, buckets[b]) for i in images), buckets[b][0] * buckets[b][1], -b),
    )


def image_sizes(sample: Pair | LabelledImage) -> list[Size]:
    """Read (height, width) of a sample's images from their headers; none if one of them cannot be read."""
    try:
        return [media.size(source.read())[::-1] for source in sample.images]
    except media.BROKEN:
        return []


@dataclass(frozen=True)
class Buckets:
    """Samples by size.

    Attributes:
        sizes: (height, width) of each bucket.
        of: Bucket of each sample; -1 leaves a sample out.
        count: Samples per iteration.
        permutation: Random permutations, keyed by a stream and integers.
        stream: Name of the streams.
    """

    sizes: tuple[Size, ...]
    of: Sequence[int]
    count: int
    permutation: Permutation
    stream: str

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """Indices of the samples of each bucket that has some."""
        found: dict[int, list[int]] = {}
        for index, bucket in enumerate(self.of):
            if bucket >= 0:
                found.setdefault(bucket, []).append(index)
        return dict(sorted(found.items()))

    def _batches(self, epoch: int) -> dict[int, int]:
        """Return how many batches of each bucket begin before ``epoch``; batch k begins in epoch k count // members."""
        return {bucket: -(-epoch * len(own) // self.count) for bucket, own in self.members.items()}

    def take(self, iteration: int) -> tuple[Size, list[int]]:
        """Return the size of an iteration's images and their indices, ``count`` samples of one bucket.

        Every epoch of a bucket uses each of its samples exactly once, also if a batch crosses its end. A bucket has a
        share of the batches that is its share of the samples; those of an epoch come in random order.
        """
        # Batches that begin before an epoch are between this bound and the number of buckets more.
        total = sum(map(len, self.members.values()))
        guess = max(0, (iteration - len(self.members)) * self.count // total)
        epochs = range(guess, (iteration + 1) * self.count // total + 2)
        epoch = epochs[bisect_right(epochs, iteration, key=lambda e: sum(self._batches(e).values())) - 1]

        first, end = self._batches(epoch), self._batches(epoch + 1)
        own = [(bucket, batch) for bucket in self.members for batch in range(first[bucket], end[bucket])]
        order = self.permutation(len(own), f"{self.stream} buckets", epoch)
        bucket, batch = own[int(order[iteration - sum(first.values())])]
        members = self.members[bucket]
        places = take(len(members), self.count, batch, lambda e: self.permutation(len(members), self.stream, bucket, e))
        return self.sizes[bucket], [members[place] for place in places]

    def warning(self) -> str:
        """Name the buckets with fewer samples than a batch, which repeats them; empty if there are none."""
        few = [(self.sizes[b], len(own)) for b, own in self.members.items() if len(own) < self.count]
        if not few:
            return ""
        (height, width), found = few[0]
        return (
            f"{len(few)} of {len(self.members)} aspect buckets have fewer images than a batch of {self.count}, which "
            f"shows them several times: {height} x {width} has {found}; raise aspect_buckets for fewer sizes"
        )
