"""Choose the items of an iteration as a pure function of its number, so that resuming needs no saved iterator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor


def take(num_items: int, count: int, iteration: int, permutation: Callable[[int], Tensor]) -> list[int]:
    """Return the indices of the ``count`` items of an iteration.

    Iteration i takes positions i count to (i + 1) count - 1 of the concatenation permutation(0), permutation(1), ...
    Every epoch uses each item exactly once, also if an iteration crosses its end; only then, or when count > num_items,
    can an iteration contain an item twice.

    Args:
        num_items: Number of items, at least 1.
        count: Items per iteration, at least 1.
        iteration: From 0.
        permutation: Maps an epoch to (num_items,) integers, a permutation of 0 to num_items - 1 that depends on the
            epoch alone.

    Raises:
        ValueError: A size below 1, a negative iteration, or a permutation of another length.
    """
    if num_items < 1 or count < 1 or iteration < 0:
        raise ValueError(
            f"cannot take {count} of {num_items} items in iteration {iteration}: "
            "use at least one item, a count of at least 1 and an iteration from 0"
        )

    @cache
    def epoch_order(epoch: int) -> list[int]:
        order = permutation(epoch).tolist()
        if len(order) != num_items:
            raise ValueError(f"the permutation of epoch {epoch} has {len(order)} entries: return {num_items}")
        return order

    positions = (divmod(position, num_items) for position in range(iteration * count, (iteration + 1) * count))
    return [epoch_order(epoch)[offset] for epoch, offset in positions]
