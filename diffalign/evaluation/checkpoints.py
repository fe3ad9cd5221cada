"""What is compared: the base model, LoRAs at some scale, checkpoints, full weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Subject:
    """A column of a comparison. path: tuned weights, as for ``models.checkpoint_context``; None is the base model."""

    name: str
    path: Path | None = None
    scale: float = 1.0


BASE = Subject("base")


def parse_subject(text: str) -> Subject:
    """``PATH``, ``NAME=PATH`` or ``PATH@SCALE``; the name defaults to the last part of the path.

    ValueError: a scale that is no number, or no path. FileNotFoundError: nothing there.
    """
    name, equals, rest = text.rpartition("=")
    path, at, scale = rest.rpartition("@")
    if not at:
        path, scale = rest, "1"
    try:
        number = float(scale)
    except ValueError:
        raise ValueError(f"{text!r}: {scale!r} is no scale; write PATH@0.5, or NAME=PATH@0.5") from None
    if not math.isfinite(number):
        raise ValueError(f"{text!r}: a scale is a finite number, got {scale}; write PATH@0.5, or NAME=PATH@0.5")
    if not path:
        raise ValueError(f"{text!r} names no path; write PATH, NAME=PATH or PATH@SCALE")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give a run folder, a checkpoint or a LoRA file")
    default = Path(path).resolve().name.removesuffix(".safetensors") + (f"@{number:g}" if at else "")
    return Subject(name if equals else default, Path(path), number)


def parse_subjects(texts: Sequence[str], *, scales: Sequence[float] = (), checkpoints: bool = False) -> list[Subject]:
    """The base model, then what is named, in its order.

    scales: each named LoRA once per scale. checkpoints: each named run folder as a strip, ``checkpoint-N`` by N and the
    final weights last. ValueError or FileNotFoundError as for ``parse_subject``, or where a run has no checkpoint.
    """
    found = [parse_subject(text) for text in texts]
    if checkpoints:
        found = [step for subject in found for step in _strip(subject)]
    if scales:
        found = [replace(s, name=f"{s.name} x {scale:g}", scale=scale) for s in found for scale in scales]
    found = [BASE, *found]
    if twice := [name for name, count in Counter(s.name for s in found).items() if count > 1]:
        raise ValueError(f"{len(twice)} name(s) appear twice ({', '.join(twice)}): write NAME=PATH to tell them apart")
    return found


def _strip(run: Subject) -> list[Subject]:
    assert run.path is not None
    steps = sorted((int(match[1]), path) for path in run.path.iterdir() if (match := CHECKPOINT.fullmatch(path.name)))
    if not steps:
        raise ValueError(
            f"{run.path} has no checkpoint-N folder: train with checkpointing_steps, or leave out --checkpoints"
        )
    return [
        *(replace(run, name=f"{run.name} {step}", path=path) for step, path in steps),
        replace(run, name=f"{run.name} final"),
    ]
