"""Count prompt tokens against the limits of a model's text encoders, from its tokenizers alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from diffalign.files import shorten
from diffalign.models.base import DiffusionModel
from diffalign.models.load import absent_parts, pipeline_class
from diffalign.models.registry import get_family
from diffalign.models.single_file import layout


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a model.

    Attributes:
        name: Component name of its tokenizer.
        limit: Maximum number of tokens it reads.
        count: Counts the tokens of a text.
    """

    name: str
    limit: int
    count: Callable[[str], int]


def text_encoders(path: str | Path, max_sequence_length: int | None = None) -> list[Encoder]:
    """Return the text encoders of a pipeline. Raises as ``load_model`` does.

    Args:
        path: Folder in diffusers' layout, or hub id.
        max_sequence_length: Tokens per prompt of all encoders except CLIP; default: the family's.
    """
    path = layout(path)
    family = get_family(pipeline_class(path))
    parameter = inspect.signature(family).parameters.get("max_sequence_length")
    length = max_sequence_length or (parameter.default if parameter else None)
    index = DiffusionPipeline.load_config(path)
    absent = absent_parts(path, family)
    names = [name for name in index if name.startswith("tokenizer") and name not in absent]
    try:
        return [
            _encoder(family, name, AutoTokenizer.from_pretrained(path, subfolder=name, trust_remote_code=False), length)
            for name in names
        ]
    except (OSError, ImportError) as error:
        raise ValueError(f"model {shorten(path)}: no tokenizer to count with ({shorten(error, 300)})") from error


def _encoder(family: type[DiffusionModel], name: str, tokenizer: Any, length: int | None) -> Encoder:
    clip = "CLIP" in type(tokenizer).__name__
    limit = tokenizer.model_max_length if clip or length is None else length

    return Encoder(name, limit, partial(family.prompt_tokens, tokenizer))


def cut(text: str, encoders: Sequence[Encoder]) -> str | None:
    """Describe which encoders truncate a text; None if none does."""
    counts = [(encoder.count(text), encoder) for encoder in encoders]
    truncated = [f"{count:,} tokens, {e.name} reads {e.limit:,}" for count, e in counts if count > e.limit]
    return "; ".join(truncated) or None
