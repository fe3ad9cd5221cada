"""Configuration of ``diffalign check``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.prompt_source import LISTED

if TYPE_CHECKING:
    from diffalign.data.pairs import PairData
    from diffalign.data.stream import PairStream
    from diffalign.data.unpaired import LabelledData
    from diffalign.models.prompt_length import Encoder


@dataclass(frozen=True, kw_only=True)
class CheckConfig(PreferenceDataConfig):
    """Configuration of ``diffalign check``: that of a run's data, and of the output."""

    usage: ClassVar[str] = "diffalign check DATA ... [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign check pairs.parquet --model stabilityai/stable-diffusion-3.5-medium",
        "diffalign check prompts.txt --json",
    )
    essential: ClassVar[tuple[str, ...]] = ("data", "prompts", "model", "scan", "unpaired", "streaming", "json")

    data: tuple[str, ...] = option(
        (), "preference data or prompts: files, folders, addresses (s3://...) or hub ids", section="data"
    )
    prompts: bool = option(False, "read the data as prompts; .txt files and named sets always are", section="data")
    scan: int | None = option(None, "number of samples to check, from the first; null: all", section="data", ge=0)
    model: str | None = option(
        None, "folder or hub id of a model whose tokenizers measure prompts that are too long", section="model"
    )
    max_sequence_length: int | None = option(
        None, "tokens per prompt, as in training; default: the model's own", section="model", ge=1
    )
    unpaired: bool = option(False, "read single images that are liked or not, also from pairs", section="data")
    streaming: bool = option(False, "stream the rows, without a copy on disk", section="data")
    json: bool = option(False, "print JSON that lists every sample to leave out", section="output")

    @property
    def of_prompts(self) -> bool:
        """Whether the data are prompts instead of preferences."""
        return self.prompts or (bool(self.data) and all(_names_prompts(source) for source in self.data))

    def unread(self) -> dict[str, str]:
        """Return the fields that prompts have no use for, with the reason."""
        if not self.of_prompts:
            return {}
        reason = "not read of prompts, which have options of their own, e.g. 'owner/name?split=test&limit=100'"
        return dict.fromkeys((*(field.name for field in fields(PreferenceDataConfig)), "unpaired", "streaming"), reason)

    def encoders(self) -> list[Encoder] | None:
        """Load the text encoders of ``model``; None without a model. FileNotFoundError, ValueError: no such model."""
        from diffalign.models.prompt_length import text_encoders

        return None if self.model is None else text_encoders(self.model, self.max_sequence_length)

    def settings(self) -> PreferenceDataConfig:
        """Return the data settings of a run, with no fault that stops the reading."""
        given = {field.name: getattr(self, field.name) for field in fields(PreferenceDataConfig)}
        tolerant = {kind: "drop" if action == "error" else action for kind, action in self.on_fault.items()}
        ties = "soft" if self.ties == "error" else self.ties
        return PreferenceDataConfig(**{**given, "on_fault": tolerant, "ties": ties})

    def open(self) -> PairData | LabelledData | PairStream:
        """Open the data. ValueError: single images cannot be streamed."""
        from diffalign.data.pairs import open_pairs
        from diffalign.data.stream import PairStream, open_stream_part
        from diffalign.data.unpaired import open_labelled

        if not self.streaming:
            return (open_labelled if self.unpaired else open_pairs)(*self.data, settings=self.settings())
        if self.unpaired:
            raise ValueError("single images cannot be streamed: leave out streaming or unpaired")
        return PairStream([open_stream_part(source, self.settings()) for source in self.data], self.settings())


def _names_prompts(source: str) -> bool:
    name = source.partition("?")[0]
    return name in LISTED or name.lower().endswith(".txt")
