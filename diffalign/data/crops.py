"""Resize, flip and crop, drawn once for a pair; and the sizes that SDXL is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from diffalign.data.images import to_uint8

DRAWS = 2**32  # how many values a drawn integer can have


@dataclass(frozen=True)
class CropParams:
    """One choice of crop and flip. down, right: where the crop lies in what is left over, [0, 1); flip: mirrored."""

    down: float = 0.5
    right: float = 0.5
    flip: bool = False

    @classmethod
    def drawn(cls, numbers: Sequence[int], crop: str = "random", flip: bool = True) -> CropParams:
        """From three integers in [0, 2^32), uniform and independent. crop: "random" or "center"; flip: half the time.

        ValueError: another crop, or integers that are out of range.
        """
        if crop not in ("random", "center"):
            raise ValueError(f"unknown crop {crop!r}: choose random or center")
        if len(numbers) != 3 or not all(0 <= number < DRAWS for number in numbers):
            raise ValueError(f"draw three integers in [0, 2^32) for a framing, got {list(numbers)}")
        down, right = (number / DRAWS if crop == "random" else 0.5 for number in numbers[:2])
        return cls(down, right, flip and numbers[2] >= DRAWS // 2)


@dataclass(frozen=True)
class SizeConditioning:
    """SDXL's size conditioning of an image (arXiv 2307.01952, section 2.2): pixels, (height, width) or (top, left).

    original_size: before anything was done to it. crop_top_left: in the resized (and, where it was, mirrored) image.
    target_size: of what is trained on.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


def frame(image: Image.Image, resolution: int, framing: CropParams) -> tuple[Tensor, SizeConditioning]:
    """An RGB image as (3, resolution, resolution), uint8, and its size conditioning.

    The shorter side is resized to ``resolution`` (bicubic, with antialiasing), then the image is mirrored if the
    framing says so, then cropped: of f rows or columns too many, floor(position (f + 1)) are cut from the top or left.
    Images of equal size are cut at the same place, images of other sizes at the same relative place.
    """
    resized = transforms.resize(image, resolution, InterpolationMode.BICUBIC, antialias=True)
    resized = transforms.hflip(resized) if framing.flip else resized
    top = int(framing.down * (resized.height - resolution + 1))
    left = int(framing.right * (resized.width - resolution + 1))
    pixels = to_uint8(resized)[:, top : top + resolution, left : left + resolution]
    sizes = SizeConditioning((image.height, image.width), (top, left), (resolution, resolution))
    return pixels.contiguous(), sizes


def frame_pair(
    images: Sequence[Image.Image], resolution: int, framing: CropParams
) -> tuple[Tensor, tuple[SizeConditioning, ...]]:
    """Both images of a pair under one framing: (2, 3, resolution, resolution), uint8, and a size conditioning each.

    ValueError: a resolution below 1.
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}: name the side of the training images")
    framed = [frame(image, resolution, framing) for image in images]
    return torch.stack([pixels for pixels, _ in framed]), tuple(sizes for _, sizes in framed)
