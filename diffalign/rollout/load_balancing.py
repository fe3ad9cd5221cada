"""Deals the samples that an update learns from: every process makes as many passes, of the same sizes.

Groups are of consecutive samples, so that one process may have all of those that teach, and the others would wait.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import all_to_all_single


def deal(teaches: Tensor) -> Tensor:
    """The samples that each of P processes goes through: (P, c), ascending places in the flattened ``teaches``.

    teaches: (P, B) bool, of the samples that each process has. Each of those that teach is dealt once, and of the
    others as few as make equal shares of at least one. A process keeps its own up to its share; so are the others.
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
    """Whether every process goes through samples that it has, ``own`` of them each."""
    return bool((dealt // own == torch.arange(len(dealt))[:, None]).all())


def exchange(column: Tensor, dealt: Tensor, rank: int, device: torch.device) -> Tensor:
    """This process's rows of ``column`` (B, ...) for those (c, ...) that are dealt to it; all processes must ask.

    dealt: (P, c), of ``deal``. rank: of this process. device: where processes talk to each other.
    """
    own = len(column)
    given = [row[row // own == rank] % own for row in dealt]
    taken = (dealt[rank] // own).bincount(minlength=len(dealt)).tolist()
    sent = column[torch.cat(given)].to(device).contiguous()
    received = sent.new_empty(dealt.shape[1], *sent.shape[1:])
    all_to_all_single(received, sent, taken, [len(rows) for rows in given])
    return received.to(column.device)
