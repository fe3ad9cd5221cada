"""Work in a thread of its own, while the caller's goes on; on CUDA also on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def one_thread(name: str) -> ThreadPoolExecutor:
    """An executor that does one thing after the other, as torch would in the main thread. It starts when it is used."""
    # A thread has as many of OpenMP's as the environment says, until torch is asked; and sums depend on their number.
    return ThreadPoolExecutor(1, name, initializer=torch.get_num_threads)


def start(pool: Executor, call: Callable[[Tensor], T], images: Tensor) -> Future[T]:
    """Starts ``call(images)`` in ``pool``.

    On CUDA its kernels run beside the caller's, after those that make ``images``, and are done when the future is.
    """
    if images.device.type != "cuda":
        return pool.submit(call, images)
    return pool.submit(_on_own_stream, call, images, torch.cuda.current_stream(images.device).record_event())


def _on_own_stream(call: Callable[[Tensor], T], images: Tensor, ready: torch.cuda.Event) -> T:
    stream = _stream(images.device)
    with torch.cuda.stream(stream):  # a thread begins with the first device and its default stream
        stream.wait_event(ready)
        try:
            return call(images)
        finally:
            # Until then ``images`` are held here, so that the caller's stream cannot be given their memory.
            stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One per device for good: each new one would have its own cache of memory."""
    return torch.cuda.Stream(device)
