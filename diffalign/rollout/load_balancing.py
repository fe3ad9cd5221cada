"""Balance the samples of an optimizer step that have a gradient: all processes make equally many passes of equal size.

The samples of a group are consecutive, so that without it one process could have most samples with a gradient, and the
others would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import all_to_all_single


def deal(teaches: Tensor) -> Tensor:
    """Assign samples to P processes.

    Each sample with a gradient is assigned once, and of the others as few as make equal shares of at least one. A
    process keeps samples of its own up to its share.

    Args:
        teaches: (P, B) bool, whether each sample of each process has a gradient.

    Returns:
        (P, c), ascending indices into the flattened ``teaches``.
    """
    processes, own = teaches.shape
    count = max(1, -(-int(teaches.sum()) // processes))

    def places(kind: Tensor) -> list[list[int]]:
        return [(row.nonzero().flatten() + rank * own).tolist() for rank, row in enumerate(kind)]

    mine = places(teaches)
    spare = [place for row in mine for place in row[count:]]
    dealt = []
    for row, rest in zip(mine, places(~teaches), strict=True):
        missing = max(0, count - len(row))
        received, spare = spare[:missing], spare[missing:]
        dealt.append(sorted([*row[:count], *received, *rest[: missing - len(received)]]))
    return torch.tensor(dealt)


def at_home(dealt: Tensor, own: int) -> bool:
    """Return whether every process was assigned samples of its own only; each has ``own`` of them."""
    return bool((dealt // own == torch.arange(len(dealt))[:, None]).all())


def exchange(column: Tensor, dealt: Tensor, rank: int, device: torch.device) -> Tensor:
    """Send rows of ``column`` to the processes they are assigned to, and receive this process's. Collective.

    Args:
        column: (B, ...), rows of this process.
        dealt: (P, c), see ``deal``.
        rank: Rank of this process.
        device: Device of the communication.

    Returns:
        (c, ...), the rows of the assigned samples.
    """
    own = len(column)
    given = [row[row // own == rank] % own for row in dealt]
    taken = (dealt[rank] // own).bincount(minlength=len(dealt)).tolist()
    sent = column[torch.cat(given)].to(device).contiguous()
    received = sent.new_empty(dealt.shape[1], *sent.shape[1:])
    all_to_all_single(received, sent, taken, [len(rows) for rows in given])
    return received.to(column.device)
