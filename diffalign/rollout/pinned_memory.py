"""Store the latents of an iteration on the GPU, or in pinned main memory, and copy rows to and fro.

Copies are asynchronous, so that ``put`` and ``take`` do not synchronise. Call ``settle`` between writing and reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest size in bytes kept on a GPU. Copying that much takes 0.1 s, and sampling it minutes.
ON_GPU = 1 << 30


def pinned(size: int, device: torch.device) -> bool:
    """Return whether latents of ``size`` bytes that are computed on ``device`` are stored in pinned main memory."""
    return device.type == "cuda" and size > ON_GPU


def put(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """Set ``column[rows] = values``: column (N, ...), rows (n,) on the CPU, values (n, ...) on any device."""
    if column.device == values.device:
        column[rows] = values.to(column.dtype)
    else:
        put_rows(column, rows, values)


def put_rows(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """Copy row by row: rows that are not contiguous would pass through unpinned memory, which synchronises."""
    for row, value in zip(rows.tolist(), values.to(column.dtype), strict=True):
        column[row].copy_(value, non_blocking=True)


def take(column: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Return ``column[rows]`` on ``device``."""
    if column.device == device:
        return column[rows]
    return take_rows(column, rows, pin=device.type == "cuda").to(device, non_blocking=True)


def take_rows(column: Tensor, rows: Tensor, pin: bool) -> Tensor:
    """Return ``column[rows]``, in pinned memory with ``pin``, so that the next copy can be asynchronous."""
    found = torch.empty(len(rows), *column.shape[1:], dtype=column.dtype, pin_memory=pin)
    return torch.index_select(column, 0, rows, out=found)


def settle(column: Tensor, device: torch.device) -> None:
    """Wait for the copies that ``put`` has queued on ``device``."""
    if column.device != device:
        torch.cuda.current_stream(device).synchronize()
