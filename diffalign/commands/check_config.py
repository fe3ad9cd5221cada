"""Configuration of ``diffalign check``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig

if TYPE_CHECKING:
    from diffalign.data.pairs import PairData
    from diffalign.data.stream import PairStream
    from diffalign.data.unpaired import LabelledData
    from diffalign.models.prompt_length import Encoder


@dataclass(frozen=True, kw_only=True)
class CheckConfig(PreferenceDataConfig):
    """Fields of ``diffalign check``: those of a run's data, and what is printed."""

    data: tuple[str, ...] = option((), "files, folders or hub ids of preference data, or files of prompts")
    prompts: bool = option(False, "as prompts, a line each; .txt files always are")
    scan: int | None = option(None, "at most so many samples from the first on; null: all")
    model: str | None = option(None, "folder or hub id of a model whose tokens count, where a prompt is too long")
    max_sequence_length: int | None = option(
        None, "tokens per prompt, as in the training; default: the model's own", ge=1
    )
    unpaired: bool = option(False, "as single images that are liked or not, which pairs can be too")
    streaming: bool = option(False, "one row after the other, without a copy on disk")
    json: bool = option(False, "print JSON, with every sample that would be left out")

    @property
    def of_prompts(self) -> bool:
        """Whether the data are prompts, and no preferences."""
        return self.prompts or (bool(self.data) and all(source.lower().endswith(".txt") for source in self.data))

    def encoders(self) -> list[Encoder] | None:
        """The text encoders of ``model``; None where it is not given. FileNotFoundError, ValueError: no such model."""
        from diffalign.models.prompt_length import text_encoders

        return None if self.model is None else text_encoders(self.model, self.max_sequence_length)

    def settings(self) -> PreferenceDataConfig:
        """Return a run's settings, but let nothing that is found stop the reading."""
        given = {field.name: getattr(self, field.name) for field in fields(PreferenceDataConfig)}
        tolerant = {kind: "drop" if action == "error" else action for kind, action in self.on_fault.items()}
        ties = "soft" if self.ties == "error" else self.ties
        return PreferenceDataConfig(**{**given, "on_fault": tolerant, "ties": ties})

    def open(self) -> PairData | LabelledData | PairStream:
        """The data. ValueError: single images cannot be streamed."""
        from diffalign.data.pairs import open_pairs
        from diffalign.data.stream import PairStream, open_stream_part
        from diffalign.data.unpaired import open_labelled

        if not self.streaming:
            return (open_labelled if self.unpaired else open_pairs)(*self.data, settings=self.settings())
        if self.unpaired:
            raise ValueError("single images cannot be streamed: leave out streaming or unpaired")
        return PairStream([open_stream_part(source, self.settings()) for source in self.data], self.settings())
