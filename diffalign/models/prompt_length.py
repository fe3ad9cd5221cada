"""How many tokens the text encoders of a model read of a prompt: tokenizers alone, no weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from diffalign.files import shorten
from diffalign.models.load import FAMILIES, pipeline_class

# What a pipeline puts around a prompt, as its own code does.
SUFFIX = {"QwenImagePipeline": "<|im_end|>\n<|im_start|>assistant\n"}
BESIDE = {"SanaPipeline": 1}  # tokens of its instruction's end that stand in the window


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a model. name: of its tokenizer; limit: tokens that it reads; count: tokens of a text."""

    name: str
    limit: int
    count: Callable[[str], int]


def text_encoders(path: str | Path, max_sequence_length: int | None = None) -> list[Encoder]:
    """The text encoders of a pipeline.

    Args:
        path: folder in diffusers' layout, or hub id.
        max_sequence_length: tokens per prompt of all encoders but CLIP's; default: the family's.

    FileNotFoundError, ValueError: as ``load_model``.
    """
    kind = pipeline_class(path)
    parameter = inspect.signature(FAMILIES[kind]).parameters.get("max_sequence_length")
    length = max_sequence_length or (parameter.default if parameter else None)
    index = DiffusionPipeline.load_config(path)
    names = [name for name, entry in index.items() if name.startswith("tokenizer") and entry and entry[0]]
    try:
        return [
            _encoder(kind, name, AutoTokenizer.from_pretrained(path, subfolder=name, trust_remote_code=False), length)
            for name in names
        ]
    except (OSError, ImportError) as error:
        raise ValueError(f"model {shorten(path)}: no tokenizer to count with ({shorten(error, 300)})") from error


def _encoder(kind: str, name: str, tokenizer: Any, length: int | None) -> Encoder:
    clip = "CLIP" in type(tokenizer).__name__
    limit = tokenizer.model_max_length if clip or length is None else length

    def count(text: str) -> int:
        if kind == "ZImagePipeline":
            messages = [{"role": "user", "content": text}]
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
            text = tokenizer.apply_chat_template(messages, **options)
        ids = tokenizer(text + SUFFIX.get(kind, ""), verbose=False).input_ids
        return len(ids) + BESIDE.get(kind, 0)

    return Encoder(name, limit, count)


def cut(text: str, encoders: list[Encoder]) -> str | None:
    """Say which encoders read only the beginning of a text; None where each reads all of it."""
    found = [(encoder.count(text), encoder) for encoder in encoders]
    said = [f"{count:,} tokens, {e.name} reads {e.limit:,}" for count, e in found if count > e.limit]
    return "; ".join(said) or None
