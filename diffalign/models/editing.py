"""What families that edit a source image share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign import media
from diffalign.files import read_bytes, shorten
from diffalign.models.base import DiffusionModel
from diffalign.structures import Conditioning, EditInput, Input, Prompt

SOURCE = "source"  # name of the source's latents among the tensors of a conditioning


def edit_input(given: Input) -> EditInput:
    """Return an input with a source image. Raises ValueError for a text alone."""
    if isinstance(given, str):
        raise ValueError(
            f"prompt {shorten(given, 80)!r} has no source image, and this model edits one: add "
            '"image": "FILE", of pairs to their "metadata", relative to the file that names it, or name a column of '
            "images: prompts.parquet?image=COLUMN"
        )
    return given


def sized_input(model: DiffusionModel, prompt: Prompt, size: tuple[int, int] | None) -> Input:
    """Return the input of a prompt whose source image, if it has one, is fitted to (height, width) of the result."""
    given = prompt.input
    if isinstance(given, str) or size in (None, model.default_resolution):
        return given
    return given._replace(size=size)


def source_image(given: EditInput, size: tuple[int, int]) -> Image.Image:
    """Read a source image in RGB, fitted to (height, width).

    Raises:
        ValueError: The file is missing or no image.
    """
    with _named(given):
        return media.fitted(read_bytes(Path(given.image)), size)


def source_pixels(given: EditInput, size: tuple[int, int]) -> Tensor:
    """Read a source image as ``source_image`` does: (1, 3, H, W), float32, in [0, 1]."""
    return pixels_of(source_image(given, size))


def pixels_of(image: Image.Image) -> Tensor:
    """Convert an image in RGB: (1, 3, H, W), float32, in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@contextmanager
def _named(given: EditInput) -> Iterator[None]:
    """Name the source and its prompt in errors of reading it."""
    try:
        yield
    except media.BROKEN as error:
        raise ValueError(
            f"source image {shorten(given.image)} of {shorten(given.text, 60)!r}: {media.reason(error)}; check the path"
        ) from error


def with_source(negative: Conditioning, conditioning: Conditioning) -> Conditioning:
    """Give a negative the source latents of a conditioning."""
    return Conditioning({**negative.tensors, SOURCE: conditioning.tensors[SOURCE]}, negative.shared)


def check_sources(model: DiffusionModel, prompts: Iterable[Prompt]) -> None:
    """Check that every prompt of a model that edits has a source image; do nothing for other models.

    Raises:
        ValueError: A prompt without a source image, or with a file that is missing or no image.
    """
    if not model.edits:
        return
    seen = set[str]()
    for prompt in prompts:
        edit = edit_input(prompt.input)
        if edit.image not in seen:
            seen.add(edit.image)
            with _named(edit):
                media.size(read_bytes(Path(edit.image)))


def check_source_column(model: DiffusionModel, column: str | None) -> None:
    """Raise ValueError for a column of source images if the model does not edit."""
    if column is not None and not model.edits:
        raise ValueError(f"data.source {column}: a {type(model.pipeline).__name__} edits no images: leave it out")


def example_prompt(model: DiffusionModel, text: str) -> Prompt:
    """Make a prompt that a model can encode, for models that edit with a grey source image."""
    return Prompt(text, {"image": _grey_image()}) if model.edits else Prompt(text)


@cache
def _grey_image() -> str:
    path = Path(tempfile.mkdtemp()) / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(path)
    return str(path)
