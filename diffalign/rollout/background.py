"""Run work in a background thread, on CUDA on a separate stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def one_thread(name: str) -> ThreadPoolExecutor:
    """Return an executor of one thread with as many threads of torch as the main thread; it starts on first use."""
    # A new thread uses OMP_NUM_THREADS threads until torch sets their number, and sums depend on it.
    return ThreadPoolExecutor(1, name, initializer=torch.get_num_threads)


def start(pool: Executor, call: Callable[..., T], *samples: Tensor | None) -> Future[T]:
    """Start ``call(*samples)`` in ``pool``.

    On CUDA its kernels run concurrently with the caller's, after those that compute ``samples``, and have finished when
    the future has.
    """
    device = next(part.device for part in samples if part is not None)
    if device.type != "cuda":
        return pool.submit(call, *samples)
    return pool.submit(_on_own_stream, call, samples, device, torch.cuda.current_stream(device).record_event())


def _on_own_stream(
    call: Callable[..., T], samples: Sequence[Tensor | None], device: torch.device, ready: torch.cuda.Event
) -> T:
    stream = _stream(device)
    with torch.cuda.stream(stream):  # a thread begins with the first device and its default stream
        stream.wait_event(ready)
        try:
            return call(*samples)
        finally:
            # Holds ``samples`` until the kernels end, so that their memory is not reused by the caller's stream.
            stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device, always the same: each stream has a memory cache of its own."""
    return torch.cuda.Stream(device)
