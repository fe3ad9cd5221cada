"""Configuration of ``diffalign export``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.config import Checked, option
from diffalign.evaluation.checkpoints import CheckpointSpec, parse_checkpoint

Format = Literal["diffusers", "kohya", "merged", "peft"]


@dataclass(kw_only=True)
class ExportConfig(Checked):
    """Configuration of ``diffalign export``: write trained weights for other programs."""

    usage: ClassVar[str] = "diffalign export MODEL ... --format FORMAT [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign export runs/a --format kohya --output_dir my-style",
        "diffalign export runs/a@0.7 owner/lora@0.3 --format diffusers --rank 16",
    )
    essential: ClassVar[tuple[str, ...]] = ("models", "format", "model", "output_dir", "dtype", "rank")

    models: tuple[str, ...] = option(
        (),
        "PATH or PATH@WEIGHT: run folders, checkpoints, LoRA files, hub ids; several are added, each times its weight",
        section="model",
    )
    model: str | None = option(None, "base model; default: that of the run, or of the file's header", section="model")
    revision: str | None = option(None, "branch, tag or commit of a hub model", section="model")
    family: str | None = option(
        None, "your own model family, for a pipeline of another class: file.py:Class or module:Class", section="model"
    )
    allow_reward_code: bool = option(
        False,
        "trust the code of a model family that is named; only valid on the command line",
        section="model",
        typed_only=True,
    )
    format: Format = option(
        "diffusers",
        "diffusers: pipe.load_lora_weights; kohya: ComfyUI, kohya's tools and web UIs; peft: PeftModel; merged: the "
        "whole pipeline with the LoRA in its weights",
        section="output",
    )
    dtype: Literal["fp32", "fp16", "bf16"] = option("fp32", "precision of the written weights", section="output")
    rank: int | None = option(
        None, "reduce the LoRA to this rank, by the SVD of each layer's update", section="output", ge=1, le=65_536
    )
    output_dir: Path | None = option(
        None, "output folder; kohya's file has its name; default: runs/export/NAME-FORMAT", section="output"
    )

    def specs(self) -> list[CheckpointSpec]:
        """Return the models to export. ValueError: there is none, or one is malformed."""
        if not self.models:
            raise ValueError("no model is named: write diffalign export RUN --format kohya")
        return [parse_checkpoint(text) for text in self.models]

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the base, and with each of ``models``: a missing path, or a malformed weight."""
        from diffalign.models.published_configs import published_folder
        from diffalign.preflight import model_problem

        if self.model is not None and published_folder(self.model) is None:
            yield from model_problem("model", self.model, self)
        for text in self.models:
            try:
                parse_checkpoint(text)
            except (ValueError, FileNotFoundError) as error:
                yield str(error)
