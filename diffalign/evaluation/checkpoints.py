"""Parse the models of a comparison: base model, run folders, checkpoints, LoRA files with a scale, full weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.lora_source import find_lora

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class CheckpointSpec:
    """One model of a comparison.

    Attributes:
        name: Column title, also the name of the folder with its images.
        path: Tuned weights, as for ``models.checkpoint_context``; None for the base model.
        scale: LoRA scale.
    """

    name: str
    path: Path | None = None
    scale: float = 1.0

    @property
    def folder_name(self) -> str:
        """The name with characters replaced that a folder name should not have."""
        return re.sub(r"[^\w.@-]+", "-", self.name)


BASE = CheckpointSpec("base")


def parse_checkpoint(text: str) -> CheckpointSpec:
    """Parse ``PATH``, ``NAME=PATH`` or ``PATH@SCALE``; the name defaults to the last part of the path.

    A path may be the hub id of a LoRA.

    Raises:
        ValueError: The scale is not a finite number, the path is missing, or the name cannot be a folder name.
        FileNotFoundError: The path does not exist.
    """
    name, equals, rest = text.rpartition("=")
    path, at, scale = rest.rpartition("@")
    if not at:
        path, scale = rest, "1"
    try:
        number = float(scale)
    except ValueError:
        raise ValueError(f"{text!r}: {scale!r} is not a scale; write PATH@0.5, or NAME=PATH@0.5") from None
    if not math.isfinite(number):
        raise ValueError(f"{text!r}: the scale must be finite, got {scale}; write PATH@0.5, or NAME=PATH@0.5")
    if not path:
        raise ValueError(f"{text!r} has no path; write PATH, NAME=PATH or PATH@SCALE")
    default = Path(path).resolve().name.removesuffix(".safetensors") + (f"@{number:g}" if at else "")
    spec = CheckpointSpec(name if equals else default, find_lora(path), number)
    if not re.search(r"\w", spec.name):
        raise ValueError(f"{text!r}: {spec.name!r} is not a model name; write NAME=PATH with a letter or digit in NAME")
    return spec


def parse_checkpoints(
    texts: Sequence[str], *, scales: Sequence[float] = (), checkpoints: bool = False
) -> list[CheckpointSpec]:
    """Parse model arguments and put the base model first.

    Args:
        texts: Model arguments, see ``parse_checkpoint``.
        scales: Evaluate every LoRA at each of these scales.
        checkpoints: Expand every run folder into its ``checkpoint-N`` folders, sorted by N, and its final weights.

    Raises:
        ValueError: As ``parse_checkpoint``, two models share a name, or a run has no checkpoint.
        FileNotFoundError: A path does not exist.
    """
    specs = [parse_checkpoint(text) for text in texts]
    if checkpoints:
        specs = [step for spec in specs for step in _checkpoints_of_run(spec)]
    if scales:
        specs = [replace(s, name=f"{s.name} x {scale:g}", scale=scale) for s in specs for scale in scales]
    specs = [BASE, *specs]

    for shared in _duplicates([spec.name for spec in specs]), _duplicates([spec.folder_name for spec in specs]):
        if shared:
            raise ValueError(f"models share a name or image folder ({', '.join(shared)}): write NAME=PATH for each")
    return specs


def _duplicates(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _checkpoints_of_run(run: CheckpointSpec) -> list[CheckpointSpec]:
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
