"""Images of samples: decoded, checked and identified by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign import media
from diffalign.data.validation import Fault
from diffalign.structures import ImageSource, LabelledImage, Pair

Sample = Pair | LabelledImage


def decode(source: ImageSource, content: bytes | None = None) -> Image.Image:
    """Decode an image to RGB, 8 bits: see ``media.decode``. content: its bytes, where they were read already.

    Fault "unreadable": no file, no permission, or nothing that can be decoded.
    """
    try:
        return media.decode(source.read() if content is None else content)
    except media.BROKEN as error:
        raise Fault("unreadable", source.name, media.reason(error)) from error


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W), uint8, of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_sample(sample: Sample, min_side: int = 1) -> tuple[tuple[Image.Image, ...], list[Fault]]:
    """Its images, and what is odd about them: "too_small", "same_image", "different_size".

    Fault "unreadable", "bad_mask": one of them, or their mask, cannot be used. Faults name the sample, and the image
    where one is to blame.
    """
    try:
        contents = [_read(source) for source in sample.images]
        images = tuple(decode(source, content) for source, content in zip(sample.images, contents, strict=True))
    except Fault as fault:
        raise Fault(fault.kind, sample.key, f"{fault.where.removeprefix(f'{sample.key}, ')}: {fault.detail}") from fault
    _check_mask(sample, images)
    sizes = [f"{image.width} x {image.height}" for image in images]
    odd = []
    if min(min(image.size) for image in images) < min_side:
        odd.append(Fault("too_small", sample.key, f"{' and '.join(sizes)}, min_side is {min_side}"))
    if len(images) == 2 and contents[0] == contents[1]:
        odd.append(Fault("same_image", sample.key, " and ".join(source.name for source in sample.images)))
    if len(set(sizes)) > 1:
        odd.append(Fault("different_size", sample.key, " and ".join(sizes)))
    return images, odd


def _check_mask(sample: Sample, images: Sequence[Image.Image]) -> None:
    if sample.mask is None:
        return
    try:
        mask = decode(sample.mask)
    except Fault as fault:
        raise Fault("bad_mask", sample.key, f"{fault.where.removeprefix(f'{sample.key}, ')}: {fault.detail}") from fault
    if any(image.size != mask.size for image in images):
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise Fault("bad_mask", sample.key, f"a mask of {mask.width} x {mask.height} for images of {sizes}")


def _read(source: ImageSource) -> bytes:
    try:
        return source.read()
    except media.BROKEN as error:
        raise Fault("unreadable", source.name, media.reason(error)) from error


def fetched(sample: Sample) -> Sample:
    """The same sample with the bytes of its images in memory, where they can be read."""

    def fetch(source: ImageSource) -> ImageSource:
        try:
            return replace(source, content=_read(source))
        except Fault:
            return source

    if isinstance(sample, Pair):
        return replace(sample, images=tuple(fetch(source) for source in sample.images))
    return replace(sample, image=fetch(sample.image))


def digest(source: ImageSource) -> str:
    """32 hexadecimal digits of the encoded bytes. Fault "unreadable" where there are none."""
    return hashlib.blake2b(_read(source), digest_size=16).hexdigest()


def content_key(pair: Pair) -> str:
    """32 hexadecimal digits of a pair's text, metadata and encoded images, in their order; labels do not count."""
    told = json.dumps([pair.prompt.text, pair.prompt.metadata], sort_keys=True, default=str)
    parts = "\0".join([told, *map(digest, pair.images)])
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
