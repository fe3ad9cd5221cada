"""The device that computes: which one it is, what it is called, and float64 where it has none.

CUDA is asked for by name only where CUDA alone is meant: streams, pinned memory, kernels.
"""

from __future__ import annotations

import os
import platform
from functools import cache

import psutil
import torch
from torch import Tensor

CPU = torch.device("cpu")
# Values summed in float32 on a device without float64; their sums are added in float64 on the CPU.
CHUNK = 64


def default_device() -> torch.device:
    """Return the device that a training in this process would use: the accelerator (CUDA, mps, xpu, ...), or the CPU.

    The variables that accelerate's launcher sets are respected: ``--cpu``, and the index of each process.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        return CPU
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return CPU
    rank = os.environ.get("LOCAL_RANK")
    return torch.device(found.type, int(rank)) if rank and found.type != "mps" else found


def device_name(device: torch.device) -> str:
    """Return the product name of a device, or its type where torch does not know one."""
    if device.type == "cpu":
        return platform.processor() or "CPU"
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name(device) if name is not None else device.type


def free_memory(device: torch.device) -> tuple[int, str]:
    """Return the free bytes of a device, and the name of the memory; mps shares main memory."""
    found = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    if found is None:
        return psutil.virtual_memory().available, "main memory"
    return found(device)[0], device_name(device)


def total_memory(kind: str) -> int:
    """Return the bytes of the smallest device of a kind on this machine, the same for all of its processes."""
    module = torch.get_device_module(kind)
    return min(module.mem_get_info(index)[1] for index in range(module.device_count()))


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a device, as clocks must."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def supports_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16."""
    known = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return True if known is None else bool(known())


def empty_cache() -> None:
    """Release the accelerator memory that torch caches without use."""
    release = getattr(torch.get_device_module(), "empty_cache", None)
    if torch.accelerator.is_available() and release is not None:
        release()


# float64 ------------------------------------------------------------------------------------------------------------


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's mps and some of Intel's GPUs (xpu) do not."""
    return device.type in ("cpu", "cuda", "meta") or computes_float64(device.type)


@cache
def computes_float64(kind: str) -> bool:
    """Whether a sum in float64 succeeds on the current device of a kind."""
    try:
        return bool(torch.ones(2, dtype=torch.float64, device=kind).sum().item() == 2)
    except (TypeError, RuntimeError):
        return False


def float64_device(device: torch.device | str) -> torch.device:
    """Return where float64 numbers of a device's tensors live: there, or on the CPU if it has no float64."""
    return torch.device(device) if has_float64(torch.device(device)) else CPU


def to_float64(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has none; differentiable."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def mean_float64(x: Tensor) -> Tensor:
    """Average rows (B, D), summed in float64: (B,), on the CPU where the device has no float64; differentiable.

    There, sums of ``CHUNK`` values are taken on the device. Their rounding errors average out over the many chunks of
    a sample: for 16,384 values the mean is about a hundred times as exact as one in float32.
    """
    if has_float64(x.device):
        return x.mean(1, dtype=torch.float64)
    whole = x.shape[1] // CHUNK * CHUNK
    parts = x[:, :whole].unflatten(1, (-1, CHUNK)).sum(2)
    sums = torch.cat([parts, x[:, whole:]], 1)
    return sums.cpu().double().sum(1) / x.shape[1]
