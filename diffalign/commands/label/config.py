"""Configuration of ``diffalign label``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.commands.evaluate_config import ScoringConfig
from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig
from diffalign.evaluation.checkpoints import CHECKPOINT, parse_checkpoint

BASE_NAME = "base"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
LISTS = ("metadata.jsonl", "metadata.csv")  # of folders with pictures


def is_model(text: str) -> bool:
    """Return whether a source is a model: "base", a run folder, a checkpoint, weights, NAME=PATH or PATH@SCALE."""
    if text == BASE_NAME:
        return True
    path = Path(text)
    if not path.exists():
        return "=" in text or bool(re.search(r"@[^/]*$", text))
    if path.is_file():
        return path.suffix == ".safetensors"
    if any((path / name).is_file() for name in LISTS):  # a rollout buffer has .safetensors files too
        return False
    names = [entry.name for entry in path.iterdir()]
    return any(name == "config.yaml" or name.endswith(".safetensors") or CHECKPOINT.fullmatch(name) for name in names)


@dataclass(kw_only=True)
class LabelConfig(ScoringConfig):
    """Configuration of ``diffalign label``. None stands for the value in the ``config.yaml`` of the first run."""

    usage: ClassVar[str] = "diffalign label SOURCE ... [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign label base runs/a runs/b --limit 50",
        "diffalign label pairs.parquet --order disagreement --rewards pickscore,hpsv2.1",
        "diffalign label base --model assets/shapes-sd3 --prompts prompts.txt",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "models", "output_dir", "order", "raters_per_pair", "export_only", "port", "host", "model", "prompts",
        "limit", "rewards",
    )  # fmt: skip

    models: tuple[str, ...] = option(
        (),
        "what to compare: base, run folders, checkpoints, LoRA files (drawn on the spot); or pairs: tables, folders, "
        "rollout buffers, hub ids",
        section="model",
    )
    data: PreferenceDataConfig = option(PreferenceDataConfig(), "how pairs are read", section="data")
    order: Literal["random", "disagreement", "ranking"] = option(
        "random",
        "next pair: random; disagreement: hardest for the rewards first; ranking: what says most about the models",
        section="rating",
    )
    raters_per_pair: int | None = option(
        None, "show a pair to at most this many raters; default: to all", section="rating", ge=1
    )
    both_bad: Literal["tie", "drop"] = option(
        "tie", "how an answer that both images are bad is exported", section="rating"
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
        return bool(self.rewards) or any(map(is_model, self.models))

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.output_dir or Path("runs/label")

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each source."""
        for text in self.models:
            if is_model(text) and text != BASE_NAME:
                try:
                    parse_checkpoint(text)
                except (ValueError, FileNotFoundError) as error:
                    yield str(error)
            elif not is_model(text) and not Path(text).exists() and not HUB_ID.fullmatch(text):
                what = "base, a run folder, a LoRA, or a table or folder of pairs"
                yield f"models: nothing at {text[:200]!r}: name {what}"
