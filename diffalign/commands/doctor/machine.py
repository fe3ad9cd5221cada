"""Checks of the environment: versions, devices, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from diffalign.commands.doctor.findings import Finding
from diffalign.device import default_device, device_name, free_memory, supports_bf16

GIB = 2**30
# minimum for the checkpoints of a small run or a first download
MIN_DISK = 2 * GIB
DISK_PROBE = 16 * 2**20
MIN_MEMORY = 4 * GIB
# optional package -> what uses it
OPTIONAL = {
    "xformers": "attention: xformers",
    "flash-attn": "attention: flash",
    "bitsandbytes": "quantise, and optimizer: adamw_8bit",
}


def environment() -> Iterator[Finding]:
    """Report Python, CPU cores and free memory."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", "ok", f"{cores} cores, {torch.get_num_threads()} threads")
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    enough = memory.available >= MIN_MEMORY
    yield Finding("memory", "ok" if enough else "note", text, "" if enough else "close other programs before training")


def packages() -> Iterator[Finding]:
    """Compare installed packages with the requirements, then list optional ones."""
    try:
        required = [Requirement(line) for line in requires("diffalign") or ()]
    except PackageNotFoundError:
        yield Finding("diffalign", "note", "not installed (running from source): versions are not checked")
        required = []
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {one.name: _version(one.name) for one in required}
    for one in required:
        have = found[one.name]
        if have is None or not one.specifier.contains(have, prereleases=True):
            text = f"{have or 'missing'}, needs {one.specifier or 'any version'}"
            yield Finding(one.name, "problem", text, f"{sys.executable} -m pip install '{one}'")
    if found:
        shown = ("torch", "diffusers", "transformers", "accelerate", "peft")
        yield Finding("packages", "ok", ", ".join(f"{name} {found[name]}" for name in shown if found.get(name)))
    for name, use in OPTIONAL.items():
        have = _version(name)
        yield Finding(name, "ok" if have else "note", have or f"not installed; needed only for {use}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """Multiply a matrix on every GPU; report a GPU that torch does not see."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _card(index)
        return
    device = default_device()
    if device.type != "cpu":
        free, place = free_memory(device)
        yield _multiplied("GPU", device, f"{device_name(device)} ({device.type}), {free / GIB:.1f} GiB free of {place}")
        return
    if shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists():
        yield Finding(
            "GPU",
            "problem",
            f"not visible to torch {torch.__version__}",
            "install the torch build for the CUDA version of your driver (see nvidia-smi), from pytorch.org",
        )
        return
    yield Finding("GPU", "note", "none: training runs on the CPU, which is enough only for the embedded world")


def _card(index: int) -> Finding:
    free, total = torch.cuda.mem_get_info(index)
    text = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return _multiplied(f"GPU {index}", torch.device("cuda", index), text)


def _multiplied(name: str, device: torch.device, text: str) -> Finding:
    """Multiply two matrices on a device. text: its description."""
    dtype = torch.bfloat16 if supports_bf16(device) else torch.float16
    try:
        ones = torch.ones(64, 64, device=device, dtype=dtype)
        right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:
        fix = "this torch build does not support the GPU: install one that does"
        return Finding(name, "problem", f"{text}; {str(error).splitlines()[0]}", fix)
    if not right:
        return Finding(
            name, "problem", f"{text}; matrix products are wrong", "test the memory of this GPU, and train on another"
        )
    return Finding(name, "ok", text + ("" if dtype == torch.bfloat16 else "; no bfloat16: use mixed_precision fp16"))


def disk(folder: Path) -> Iterator[Finding]:
    """Measure free space and write speed where run folders go."""
    parent = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    name = f"disk ({folder})"
    try:
        with tempfile.NamedTemporaryFile(dir=parent) as file:
            start = time.perf_counter()
            file.write(os.urandom(DISK_PROBE))
            file.flush()
            os.fsync(file.fileno())
            rate = DISK_PROBE / (time.perf_counter() - start) / 1e6
    except OSError as error:
        yield Finding(
            name, "problem", f"cannot be written: {error.strerror}", "choose another folder with --output_dir"
        )
        return
    free = shutil.disk_usage(parent).free
    text = f"{free / GIB:.1f} GiB free, {rate:.0f} MB/s"
    if free < MIN_DISK:
        fix = "free some space, or choose another folder with --output_dir: a full disk loses checkpoints"
        yield Finding(name, "problem", text, fix)
    else:
        yield Finding(name, "ok", text)
