"""Resize, flip and crop images with one choice per pair, and compute SDXL's size conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from diffalign.data.images import to_uint8

DRAWS = 2**32  # drawn integers are below this


@dataclass(frozen=True)
class CropParams:
    """Crop position and flip.

    down, right: position of the crop within the excess rows and columns, in [0, 1); flip: mirror horizontally.
    """

    down: float = 0.5
    right: float = 0.5
    flip: bool = False

    @classmethod
    def drawn(cls, numbers: Sequence[int], crop: str = "random", flip: bool = True) -> CropParams:
        """Make crop parameters from three independent, uniform integers in [0, 2^32).

        Args:
            numbers: For the vertical position, the horizontal position and the flip.
            crop: "random" or "center".
            flip: Flip with probability 1/2, else never.

        Raises:
            ValueError: Unknown crop, or integers out of range.
        """
        if crop not in ("random", "center"):
            raise ValueError(f"unknown crop {crop!r}: choose random or center")
        if len(numbers) != 3 or not all(0 <= number < DRAWS for number in numbers):
            raise ValueError(f"draw three integers in [0, 2^32) for a crop, got {list(numbers)}")
        down, right = (number / DRAWS if crop == "random" else 0.5 for number in numbers[:2])
        return cls(down, right, flip and numbers[2] >= DRAWS // 2)


@dataclass(frozen=True)
class SizeConditioning:
    """SDXL's size conditioning of an image (arXiv 2307.01952, section 2.2): pixels, (height, width) or (top, left).

    original_size: before resizing. crop_top_left: in the resized, possibly flipped image. target_size: of the crop.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


def frame(image: Image.Image, size: tuple[int, int], params: CropParams) -> tuple[Tensor, SizeConditioning]:
    """Resize, flip and crop an RGB image to a size.

    The image is resized (bicubic, antialiased) to the least size of its aspect ratio that covers ``size``, then
    flipped if ``params.flip``, then cropped: of f excess rows or columns, floor(position (f + 1)) are cut from the top
    or left. Images of equal size are cropped at the same position, images of different sizes at the same relative
    position.

    Args:
        image: RGB.
        size: (height, width) of the result.
        params: Position of the crop, and whether to flip.

    Returns:
        Pixels, (3, height, width), uint8, and the image's size conditioning.
    """
    height, width = size
    resized = transforms.resize(image, list(covering(image, size)), InterpolationMode.BICUBIC, antialias=True)
    resized = transforms.hflip(resized) if params.flip else resized

    top = int(params.down * (resized.height - height + 1))
    left = int(params.right * (resized.width - width + 1))
    pixels = to_uint8(resized)[:, top : top + height, left : left + width]

    return pixels.contiguous(), SizeConditioning((image.height, image.width), (top, left), (height, width))


def covering(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return the least (height, width) of an image's aspect ratio that covers ``size``, rounded down as torchvision."""
    height, width = size
    if height * image.width >= width * image.height:  # the height binds, and columns are cut
        return height, max(width, int(height * image.width / image.height))
    return max(height, int(width * image.height / image.width)), width
