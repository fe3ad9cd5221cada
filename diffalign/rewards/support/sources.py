"""Read the source images of edits for rewards."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign import media
from diffalign.files import read_bytes, shorten

DATA = "data:image/*;base64,"


def source_images(metadata: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Tensor:
    """Read the source image of each prompt, fitted as the model sees it.

    Args:
        metadata: B mappings with "image", the path of the source.
        size: (height, width) of the results.

    Returns:
        (B, 3, height, width), float32, in [0, 1], on the CPU.

    Raises:
        ValueError: A prompt has no source image, or one that cannot be read.
    """
    read: dict[str, Tensor] = {}
    paths = [_path(entry) for entry in metadata]
    for path in paths:
        if path not in read:
            try:
                image = media.fitted(_content(path), size)
            except media.BROKEN as error:
                raise ValueError(f"source image {shorten(path)}: {media.reason(error)}; check the path") from error
            read[path] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return torch.stack([read[path] for path in paths])


def portable(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata for a server, with the source image itself in place of its path."""
    found = entry.get("image")
    if not isinstance(found, str) or not os.path.isfile(found):  # which takes texts of any length
        return dict(entry)
    return {**entry, "image": DATA + base64.b64encode(read_bytes(Path(found))).decode()}


def without_paths(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata of a client without a source image that is a path, which would be one of the server's files."""
    found = entry.get("image")
    outside = isinstance(found, str) and not found.startswith(DATA)
    return {name: value for name, value in entry.items() if not (outside and name == "image")}


def _content(path: str) -> bytes:
    return base64.b64decode(path.removeprefix(DATA)) if path.startswith(DATA) else read_bytes(Path(path))


def _path(entry: Mapping[str, Any]) -> str:
    found = entry.get("image")
    if not isinstance(found, str) or not found:
        raise ValueError('the prompt has no source image: add "image": "FILE" to its metadata')
    return found
