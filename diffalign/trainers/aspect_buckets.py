"""Sort the images of a training into aspect-ratio buckets that its model can generate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from diffalign.data.buckets import Buckets, Size, bucket_sizes, image_sizes, nearest_bucket
from diffalign.data.pairs import Samples
from diffalign.models import DiffusionModel
from diffalign.runtime.run import Run


def model_buckets(model: DiffusionModel, step: int) -> tuple[Size, ...]:
    """List the bucket sizes of a model's resolution.

    Args:
        model: Its resolution is the first bucket, and it may refuse sizes.
        step: Sides of the other buckets are multiples of it, in pixels.

    Raises:
        ValueError: ``step`` is no multiple of the model's unit, or no second size has the area of the resolution.
    """
    unit = model.resolution_unit
    if step % unit:
        up = -(-step // unit) * unit
        raise ValueError(
            f"aspect_buckets {step}: sides of this model's images are multiples of {unit} pixels; give {up}"
        )

    def usable(size: Size) -> bool:
        try:
            model.check_resolution(size)
        except ValueError:
            return False
        return True

    height, width = model.default_resolution
    sizes = bucket_sizes((height, width), step, usable)
    if len(sizes) < 2:
        raise ValueError(
            f"aspect_buckets {step}: {height} x {width} is the only size of its area; give a smaller step, such as "
            f"{unit}, or a larger resolution"
        )
    return sizes


def make_buckets(run: Run[Any], data: Samples, indices: Sequence[int], step: int, count: int, stream: str) -> Buckets:
    """Sort samples into buckets by the headers of their images, which the processes read in shares.

    Args:
        run: The training.
        data: Samples with images.
        indices: The samples to use.
        step: Step of the sides of buckets, in pixels.
        count: Samples per iteration.
        stream: Name of the stream of random permutations.

    Returns:
        Buckets of positions in ``indices``.
    """
    sizes = model_buckets(run.model, step)
    own = [image_sizes(data[indices[place]]) for place in range(run.rank, len(indices), run.world)]
    # Images that cannot be read are replaced by the next usable ones when they are loaded.
    nearest = [(run.rank + i * run.world, nearest_bucket(found, sizes) if found else 0) for i, found in enumerate(own)]
    of = [bucket for _, bucket in sorted(run.gather_objects(nearest))]
    buckets = Buckets(sizes, of, count, run.rng.permutation, stream)
    if text := buckets.warning():
        warnings.warn(text, stacklevel=2)
    return buckets
