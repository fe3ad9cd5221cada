"""What a source of ``diffalign label`` is: a model, a folder of one model's pictures, or preference data."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from diffalign.evaluation.checkpoints import CHECKPOINT

BASE_NAME = "base"
LISTS = ("metadata.jsonl", "metadata.csv")  # of folders with pictures
Kind = Literal["model", "pictures", "pairs"]


def kind_of(text: str) -> Kind:
    """Tell what a source is.

    Returns:
        "model": ``base``, a run folder, a checkpoint or weights, also as NAME=PATH and PATH@SCALE. "pictures": a folder
        with image files in it, also as NAME=PATH. "pairs": anything else, such as a table, a folder of pairs, a rollout
        buffer or a hub id.
    """
    if text == BASE_NAME:
        return "model"
    name, path = split_name(text)
    if not os.path.exists(path):  # unlike Path.exists, False for names that are too long
        return "model" if name or re.search(r"@[^/]*$", text) else "pairs"
    if path.is_file():
        return "model" if path.suffix == ".safetensors" else "pairs"
    names = [entry.name for entry in path.iterdir()]
    listed = any(name in LISTS for name in names)  # a rollout buffer has .safetensors files too
    if not listed and any(_is_weights(name) for name in names):
        return "model"
    return "pictures" if _holds_pictures(path) else "pairs"


def split_name(text: str) -> tuple[str, Path]:
    """Split ``NAME=PATH`` at the = behind which a path exists; the name is empty if the whole text is a path."""
    places = [place for place, letter in enumerate(text) if letter == "="]
    splits = [("", text), *((text[:place], text[place + 1 :]) for place in places)]
    there = (split for split in splits if os.path.exists(split[1]))
    name, path = next(there, splits[-1])
    return name, Path(path)


def _is_weights(name: str) -> bool:
    return (
        name in ("config.yaml", "model_index.json")
        or name.endswith(".safetensors")
        or CHECKPOINT.fullmatch(name) is not None
    )


def _holds_pictures(folder: Path) -> bool:
    from diffalign.data.folders import is_picture, listed

    columns = [] if (entries := listed(folder)) is None else entries.columns
    if {"group", "rewards"} <= set(columns) or any(name.endswith("_file_name") for name in columns):
        return False  # a rollout buffer, or pairs in the layout of ``datasets``
    return any(is_picture(path) and path.is_file() for path in folder.iterdir())
