"""Convert PIL images, files, arrays and tensors to the tensors that rewards take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffalign import media
from diffalign.files import read_bytes, shorten
from diffalign.remote import local

# Values outside are in [0, 255] or [-1, 1]; a VAE may overshoot [0, 1] slightly.
LOWEST, HIGHEST = -0.5, 2.0
Picture = Image.Image | str | Path | np.ndarray | Tensor


def as_image(picture: Picture) -> Tensor:
    """Convert one image to (3, H, W), float, [0, 1].

    Files and PIL images are decoded as by all commands: see ``media.decode``. float64 is kept.

    Args:
        picture: a PIL image, a path or fsspec address, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor
            with channels first; uint8, or floats in [0, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: another type, shape or dtype, floats far outside [0, 1], or a file that cannot be decoded.
    """
    if isinstance(picture, (str, Path)):
        return _from_file(local(picture))
    if isinstance(picture, Image.Image):
        return from_pil(media.to_rgb(picture))
    if isinstance(picture, np.ndarray):
        rows = picture[:, :, None] if picture.ndim == 2 else picture
        picture = torch.from_numpy(np.ascontiguousarray(rows)).movedim(-1, 0) if rows.ndim == 3 else rows
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (1, 3, 4):
        found = f"shape {tuple(picture.shape)}" if hasattr(picture, "shape") else f"a {type(picture).__name__}"
        raise ValueError(f"{found} is not an image: pass a PIL image, a path, an array (H, W, 3) or a tensor (3, H, W)")
    if not picture.is_floating_point() and picture.dtype != torch.uint8:
        raise ValueError(f"an image of {picture.dtype}: pass uint8, or floats in [0, 1]")
    if picture.is_floating_point() and picture.numel() and picture.max() > HIGHEST:
        raise ValueError(f"an image of floats up to {picture.max():g}: pass floats in [0, 1], or uint8")
    if picture.is_floating_point() and picture.numel() and picture.min() < LOWEST:
        raise ValueError(f"an image of floats down to {picture.min():g}: pass floats in [0, 1], or uint8")
    rgb = picture[:3].expand(3, -1, -1)
    return rgb.float() / 255 if picture.dtype == torch.uint8 else rgb


def _from_file(path: Path) -> Tensor:
    try:
        return from_pil(media.decode(read_bytes(path)))
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture at {shorten(path)}: check the path (relative to {Path.cwd()})") from None
    except media.BROKEN as error:
        raise ValueError(f"{shorten(path)} cannot be read as a picture: {media.reason(error)}") from error


def from_pil(picture: Image.Image) -> Tensor:
    """Convert an RGB PIL image to (3, H, W), float32, [0, 1]."""
    return pil_to_tensor(picture).float() / 255


def separate(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """List the images of a sequence, of a tensor or array with a batch dimension, or a single one."""
    if isinstance(pictures, (Tensor, np.ndarray)) and pictures.ndim == 4:
        return list(pictures)
    if isinstance(pictures, (Image.Image, str, Path, Tensor, np.ndarray)) or not isinstance(pictures, Sequence):
        return [pictures]
    return list(pictures)


def as_images(pictures: Picture | Sequence[Picture]) -> Tensor:
    """Convert images of one size to (B, 3, H, W), float, [0, 1]: see ``as_image``.

    Accepts a sequence, one image, or a tensor or array with a batch dimension. Raises ValueError if sizes differ.
    """
    images = [as_image(picture) for picture in separate(pictures)]
    if not images:
        return torch.zeros(0, 3, 1, 1)
    if len(sizes := {tuple(image.shape[1:]) for image in images}) > 1:
        raise ValueError(f"images of {len(sizes)} sizes cannot be one batch: score them with diffalign.score_images")
    return torch.stack(images)
