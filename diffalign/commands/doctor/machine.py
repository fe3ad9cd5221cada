"""The environment: versions, devices, memory, disk."""

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

GIB = 2**30
# Less cannot hold the checkpoints of a small run, nor a first download.
DISK = 2 * GIB
DISK_PROBE = 16 * 2**20
MEMORY = 4 * GIB
# Packages that are not required, and what they are for.
OPTIONAL = {
    "xformers": "attention: xformers",
    "flash-attn": "attention: flash",
    "bitsandbytes": "quantise, and optimizer: adamw_8bit",
}


def environment() -> Iterator[Finding]:
    """Interpreter, processor and memory."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", "ok", f"{cores} cores, {torch.get_num_threads()} threads")
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    enough = memory.available >= MEMORY
    yield Finding("memory", "ok" if enough else "note", text, "" if enough else "end other programs before a run")


def packages() -> Iterator[Finding]:
    """What this package requires, then what it can use."""
    try:
        required = [Requirement(line) for line in requires("diffalign") or ()]
    except PackageNotFoundError:
        yield Finding("diffalign", "note", "runs from its source, not installed: versions are not checked")
        required = []
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {one.name: _version(one.name) for one in required}
    for one in required:
        if not (found[one.name] and one.specifier.contains(found[one.name], prereleases=True)):
            text = f"{found[one.name] or 'missing'}, and {one.specifier or 'any version'} is needed"
            yield Finding(one.name, "problem", text, f"{sys.executable} -m pip install '{one}'")
    if found:
        shown = ("torch", "diffusers", "transformers", "accelerate", "peft")
        yield Finding("packages", "ok", ", ".join(f"{name} {found[name]}" for name in shown if found.get(name)))
    for name, use in OPTIONAL.items():
        have = _version(name)
        yield Finding(name, "ok" if have else "note", have or f"not installed; only for {use}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """What torch can compute on, by a multiplication there; and a card that it does not see."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _card(index)
        return
    if shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists():
        yield Finding(
            "GPU",
            "problem",
            f"there is one, and torch {torch.__version__} does not see it",
            "install the build of torch for your driver's CUDA (nvidia-smi shows it), see pytorch.org",
        )
        return
    yield Finding("GPU", "note", "none: trainings run on the CPU, which suits the embedded world and no real model")


def _card(index: int) -> Finding:
    name = f"GPU {index}"
    free, total = torch.cuda.mem_get_info(index)
    text = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=dtype)
        right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:
        fix = "this build of torch has no code for the card: install one that lists it"
        return Finding(name, "problem", f"{text}; {str(error).splitlines()[0]}", fix)
    if not right:
        return Finding(name, "problem", f"{text}; it multiplies wrongly", "test the card's memory, and use another")
    return Finding(name, "ok", text + ("" if dtype == torch.bfloat16 else "; no bfloat16: use mixed_precision fp16"))


def disk(folder: Path) -> Iterator[Finding]:
    """Space where run folders go, and whether it can really be written."""
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    name = f"disk ({folder})"
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            begun = time.perf_counter()
            file.write(os.urandom(DISK_PROBE))
            file.flush()
            os.fsync(file.fileno())
            rate = DISK_PROBE / (time.perf_counter() - begun) / 1e6
    except OSError as error:
        yield Finding(name, "problem", f"cannot be written: {error.strerror}", "give another place with --output_dir")
        return
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free, {rate:.0f} MB/s"
    if free < DISK:
        fix = "free some, or give another place with --output_dir: a full disk loses checkpoints"
        yield Finding(name, "problem", text, fix)
    else:
        yield Finding(name, "ok", text)
