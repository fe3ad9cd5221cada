"""Decode, check and hash the images of samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image

from diffalign import media
from diffalign.data.validation import SampleError
from diffalign.files import shorten
from diffalign.structures import ImageSource, LabelledImage, Pair, Prompt

if TYPE_CHECKING:
    from torch import Tensor

Sample = Pair | LabelledImage


def decode(source: ImageSource, content: bytes | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB with ``media.decode``.

    Args:
        source: The image.
        content: Its encoded bytes, if they were read already.

    Raises:
        SampleError: "unreadable": no file, no permission, or bytes that cannot be decoded.
    """
    try:
        return media.decode(source.read() if content is None else content)
    except media.BROKEN as error:
        raise SampleError("unreadable", source.name, media.reason(error)) from error


def to_uint8(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor, (3, H, W), uint8."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_sample(sample: Sample, min_side: int = 1) -> tuple[tuple[Image.Image, ...], list[SampleError]]:
    """Decode the images of a sample and check them.

    Args:
        sample: A pair or a single image.
        min_side: An image with a shorter side, in pixels, is "too_small".

    Returns:
        The RGB images, and an error for each of "too_small", "same_image" and "different_size" that applies.

    Raises:
        SampleError: "unreadable" or "bad_mask": an image or the mask cannot be used. Names the sample and the image.
    """
    try:
        contents = [_read(source) for source in sample.images]
        images = tuple(decode(source, content) for source, content in zip(sample.images, contents, strict=True))
    except SampleError as error:
        raise _of_sample(error, sample, error.kind) from error

    _check_mask(sample, images)
    sizes = [f"{image.width} x {image.height}" for image in images]
    odd = []
    if min(min(image.size) for image in images) < min_side:
        odd.append(SampleError("too_small", sample.key, f"{' and '.join(sizes)}, min_side is {min_side}"))
    if len(images) == 2 and contents[0] == contents[1]:
        odd.append(SampleError("same_image", sample.key, " and ".join(source.name for source in sample.images)))
    if len(set(sizes)) > 1:
        odd.append(SampleError("different_size", sample.key, " and ".join(sizes)))
    return images, odd


def _of_sample(error: SampleError, sample: Sample, kind: str) -> SampleError:
    """Attribute the error of an image or mask to its sample; the detail begins with the column."""
    column = error.where.removeprefix(f"{sample.key}, ")
    return SampleError(kind, sample.key, f"{column}: {error.detail}")


def _check_mask(sample: Sample, images: Sequence[Image.Image]) -> None:
    if sample.mask is None:
        return
    try:
        mask = decode(sample.mask)
    except SampleError as error:
        raise _of_sample(error, sample, "bad_mask") from error
    if any(image.size != mask.size for image in images):
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise SampleError("bad_mask", sample.key, f"a mask of {mask.width} x {mask.height} for images of {sizes}")


def _read(source: ImageSource) -> bytes:
    try:
        return source.read()
    except media.BROKEN as error:
        raise SampleError("unreadable", source.name, media.reason(error)) from error


@overload
def fetched(sample: Pair) -> Pair: ...


@overload
def fetched(sample: LabelledImage) -> LabelledImage: ...


def fetched(sample: Sample) -> Sample:
    """Load the encoded images of a sample into memory; unreadable ones stay as they are."""

    def fetch(source: ImageSource) -> ImageSource:
        try:
            return replace(source, content=_read(source))
        except SampleError:
            return source

    if isinstance(sample, Pair):
        first, second = sample.images
        return replace(sample, images=(fetch(first), fetch(second)))
    return replace(sample, image=fetch(sample.image))


def digest(source: ImageSource) -> str:
    """Hash the encoded bytes to 32 hexadecimal digits. Raises SampleError "unreadable"."""
    return hashlib.blake2b(_read(source), digest_size=16).hexdigest()


def source_image(prompt: Prompt) -> ImageSource | None:
    """Return the source image of an editing instruction; None without a file of that name."""
    given = prompt.input
    if isinstance(given, str) or not os.path.isfile(given.image):
        return None
    return ImageSource(shorten(given.image), Path(given.image))


def portable_metadata(prompt: Prompt) -> dict[str, Any]:
    """Return the metadata of a prompt with the name of its source image, wherever the image lies."""
    metadata = dict(prompt.metadata)
    if isinstance(image := metadata.get("image"), str) and os.path.isabs(image):
        metadata["image"] = os.path.basename(image)
    return metadata


def content_key(pair: Pair) -> str:
    """Hash a pair's text, metadata and encoded images, in order, to 32 hexadecimal digits; labels are excluded.

    Of a source image the content counts, wherever it lies.
    """
    metadata = dict(pair.prompt.metadata)
    if (source := source_image(pair.prompt)) is not None:
        metadata["image"] = digest(source)
    text = json.dumps([pair.prompt.text, metadata], sort_keys=True, default=str)
    parts = "\0".join([text, *map(digest, pair.images)])
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
