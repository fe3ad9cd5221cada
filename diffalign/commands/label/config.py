"""Configuration of ``diffalign label``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.commands.evaluate_config import ScoringConfig
from diffalign.commands.label.kinds import BASE_NAME, kind_of
from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig
from diffalign.evaluation.checkpoints import parse_checkpoint
from diffalign.preflight import HUB_ID, data_problem

# Options of images that are drawn.
DRAWING = (
    "model", "revision", "family", "max_sequence_length", "resolution", "num_steps", "schedule", "guidance_scale",
    "embedded_guidance", "base_share", "images_per_prompt", "offload", "cache_dir", "scales", "checkpoints",
    "allow_partial",
)  # fmt: skip
UNREAD = ("ties", "labels", "mask", "scan", "min_side")  # options of data that only training reads
READERS = ("prompts: models and folders of images; data: pairs and folders of images", "only models are drawn")


@dataclass(kw_only=True)
class LabelConfig(ScoringConfig):
    """Configuration of ``diffalign label``. None stands for the value in the ``config.yaml`` of the first run."""

    usage: ClassVar[str] = "diffalign label SOURCE ... [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign label base runs/a runs/b --order ranking",
        "diffalign label pairs.parquet --order disagreement --rewards pickscore,hpsv2.1",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "models", "output_dir", "order", "raters_per_pair", "export_only", "port", "host", "model", "prompts",
        "limit", "rewards",
    )  # fmt: skip

    models: tuple[str, ...] = option(
        (),
        "base, run folders, checkpoints, LoRA files, drawn on the spot; NAME=FOLDER with images of a model; or pairs: "
        "tables, folders, rollout buffers, hub ids",
        section="model",
    )
    data: PreferenceDataConfig = option(PreferenceDataConfig(), "how pairs are read", section="data")
    order: Literal["random", "given", "disagreement", "ranking"] = option(
        "random",
        "next pair: random; given: as listed, e.g. in a judge's label_next.parquet; disagreement: hardest for the "
        "rewards first; ranking: what says most about the models",
        section="data",
    )
    raters_per_pair: int | None = option(
        None, "show a pair to at most this many raters; default: to all", section="data", ge=1
    )
    both_bad: Literal["tie", "drop"] = option(
        "tie", "how an answer that both images are bad is exported", section="data"
    )
    export_only: bool = option(
        False, "write preferences and statistics of the answers so far, and serve no page", section="output"
    )
    host: str = option(
        "127.0.0.1", "address to serve at; 0.0.0.0 is open to other machines, which need a token", section="server"
    )
    port: int = option(8765, "port to serve at; 0: a free one", section="server", ge=0, le=65535)
    token_env: str | None = option(
        None,
        "environment variable with the token that the page asks for; default: none here, a new one for other machines",
        section="server",
    )

    @property
    def computes(self) -> bool:
        """Whether images are drawn or scored, which needs torch."""
        return bool(self.rewards) or "model" in map(kind_of, self.models)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.output_dir or Path("runs/label")

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each source, and each option that no source reads."""
        kinds = {*map(kind_of, self.models)}
        needs = {
            **{name: {"model"} for name in DRAWING},
            "prompts": {"model", "pictures"},
            "data": {"pairs", "pictures"},
        }
        for field in fields(self):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if kinds and field.name in needs and getattr(self, field.name) != default and not kinds & needs[field.name]:
                yield f"{field.name}: no source reads it ({READERS[field.name in DRAWING]}); leave it out"
        for name in UNREAD:
            if getattr(self.data, name) != getattr(PreferenceDataConfig(), name):
                yield f"data.{name}: label shows every pair as it is; leave it out, and give it to the training"
        if self.reward_options and not self.rewards:
            yield "reward_options: no reward is named; write --rewards NAME"
        for text in self.models:
            kind = kind_of(text)
            if kind == "model" and text != BASE_NAME:
                try:
                    parse_checkpoint(text)
                except (ValueError, FileNotFoundError) as error:
                    yield str(error)
            elif kind == "pairs" and HUB_ID.fullmatch(text):
                yield from data_problem("models", text, self.data)
            elif kind == "pairs" and not os.path.exists(text):
                what = "base, a run folder, a LoRA, or a table or folder of pairs"
                yield f"models: nothing at {text[:200]!r}: name {what}"
