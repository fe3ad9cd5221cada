"""Recognise out-of-memory errors, halve batch sizes, and suggest settings that save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffalign.config import to_dict
from diffalign.device import empty_cache
from diffalign.runtime.errors import OutOfMemory

# Batch sizes of each phase; the first one that a configuration has applies.
BATCHES = {
    "sample": ("rollout_batch_size",),
    "evaluate": ("eval_batch_size", "rollout_batch_size"),
    "update": ("train_batch_size",),
}
# Settings that save no memory in a phase.
USELESS = {
    "sample": {"gradient_checkpointing", "lora.rank"},
    "evaluate": {"gradient_checkpointing", "lora.rank", "overlap_rewards"},
    "update": {"decode_precision", "group_size", "overlap_rewards"},
}


def batch_name(config: Any, phase: str) -> str:
    """Return the name of the batch size of a phase ("sample", "evaluate", "update")."""
    return next((name for name in BATCHES[phase] if hasattr(config, name)), BATCHES[phase][-1])


def advice(config: Any, phase: str) -> str:
    """List at most three settings that save memory in a phase, with their values."""
    given = to_dict(config)
    wanted: list[tuple[str, Callable[[Any], Any]]] = [
        (batch_name(config, phase), half),
        ("gradient_checkpointing", on),
        ("offload", leaving),
        ("decode_precision", bf16),
        ("overlap_rewards", off),
        ("lora.rank", half),
    ]
    wanted += [("mixed_precision", bf16), ("resolution", smaller), ("group_size", half)]
    found = []
    for name, change in wanted:
        value: Any = given
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if name not in USELESS[phase] and value is not None and (other := change(value)) is not None:
            found.append(f"{name}: {str(other).lower()} (now {str(value).lower()})")
    return "; ".join(found[:3])


def half(value: int) -> int | None:
    """Halve a size; None if it is 1."""
    return value // 2 if value > 1 else None


def on(value: bool) -> bool | None:
    """Turn a switch on; None if it is."""
    return None if value else True


def off(value: bool) -> bool | None:
    """Turn a switch off; None if it is."""
    return False if value else None


def leaving(value: list[str]) -> str | None:
    """Return the parts to offload; None if some are."""
    return None if value else "[text_encoders, vae]"


def bf16(value: str) -> str | None:
    """Return bf16; None if half precision is in use."""
    return "bf16" if value == "no" else None


def smaller(value: int | list[int]) -> int | list[int] | None:
    """Return three quarters of a resolution, in steps of 64 pixels; None if a side would be 0."""
    if isinstance(value, int):
        return value * 3 // 4 // 64 * 64 or None
    sides = [side * 3 // 4 // 64 * 64 for side in value]
    return sides if all(sides) else None


# Texts of a plain RuntimeError of torch's CPU allocator, cuBLAS and others.
EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed", "unable to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on any device."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    text = str(error).lower()
    return known or (isinstance(error, RuntimeError) and any(words in text for words in EXHAUSTED))


def make_room(config: Any, phase: str, step: int, world: int, error: torch.OutOfMemoryError) -> str:
    """Halve the batch size of a phase with ``auto_batch``, and return what to print.

    Args:
        config: The configuration, which is changed.
        phase: "sample", "evaluate" or "update".
        step: Optimizer steps finished.
        world: Number of processes; several cannot change their batches by themselves.
        error: The error to answer.

    Raises:
        OutOfMemory: Nothing is left to halve, or ``auto_batch`` is off; the message names settings to change.
    """
    name = batch_name(config, phase)
    size = getattr(config, name, 1)
    if not config.auto_batch or size == 1 or world > 1:
        hint = "" if config.auto_batch else "; or auto_batch: true, which halves batches by itself"
        raise OutOfMemory(f"out of memory in step {step + 1} ({phase}): try {advice(config, phase)}{hint}") from error
    setattr(config, name, size // 2)
    empty_cache()
    return f"out of memory ({phase}): {name} is {size // 2} from now on"


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise ``torch.OutOfMemoryError`` for any error that means that memory ran out within the context."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)[:300] or "out of memory") from error
        raise
