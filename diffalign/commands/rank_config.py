"""Configuration of ``diffalign rank``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.commands.evaluate_config import ScoringConfig
from diffalign.config import option


@dataclass(kw_only=True)
class RankConfig(ScoringConfig):
    """Configuration of ``diffalign rank``. None stands for the value in the ``config.yaml`` of the first run."""

    usage: ClassVar[str] = "diffalign rank MODEL ... --rewards NAME [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign rank runs/a --rewards vqascore --prompts prompts.txt --images_per_prompt 9",
        "diffalign train diffusion_dpo --train_data runs/rank/a-pairs.jsonl --model BASE --loss dpo",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "models", "model", "prompts", "rewards", "images_per_prompt", "best", "output_dir", "limit", "guidance_scale",
        "num_steps", "batch_size",
    )  # fmt: skip

    best: int = option(1, "images per prompt to copy, best first", section="output", ge=1, le=100_000)
