"""Where the latents of an iteration wait: on the GPU, or in pinned main memory beside it, and the way there and back.

Copies are queued and nobody waits for them, so that ``put`` and ``take`` cost a step no synchronisation; but what was
put must not be taken before ``settle``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes that stay on a GPU; more go to main memory. A copy of that much takes 0.1 s, and sampling it minutes.
ON_GPU = 1 << 30


def pinned(size: int, device: torch.device) -> bool:
    """Whether so many bytes of latents that are made on ``device`` wait in pinned main memory."""
    return device.type == "cuda" and size > ON_GPU


def put(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """``column[rows] = values``; column (N, ...), rows (n,) on the CPU, values (n, ...) from any device."""
    if column.device == values.device:
        column[rows] = values.to(column.dtype)
    else:
        put_rows(column, rows, values)


def put_rows(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """A copy per row: several that do not lie together would go through memory that is not pinned, with a wait."""
    for row, value in zip(rows.tolist(), values.to(column.dtype), strict=True):
        column[row].copy_(value, non_blocking=True)


def take(column: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """``column[rows]`` on ``device``."""
    if column.device == device:
        return column[rows]
    return take_rows(column, rows, pin=device.type == "cuda").to(device, non_blocking=True)


def take_rows(column: Tensor, rows: Tensor, pin: bool) -> Tensor:
    """``column[rows]``. pin: in pinned memory, because only then the copy that follows needs no wait."""
    found = torch.empty(len(rows), *column.shape[1:], dtype=column.dtype, pin_memory=pin)
    return torch.index_select(column, 0, rows, out=found)


def settle(column: Tensor, device: torch.device) -> None:
    """Waits for what ``put`` has queued on ``device``."""
    if column.device != device:
        torch.cuda.current_stream(device).synchronize()
