"""JPEG file size as a reward, from DDPO (arXiv 2305.13301): no weights, so it suits first tests of a training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import on_images, to_bytes

QUALITY = 95
DDPO = "arXiv 2305.13301"


def jpeg_kilobytes(image: Tensor) -> float:
    """Measure the size of an image (3, H, W), [0, 1], as a JPEG of quality 95, in kB of 1000 bytes."""
    pixels = to_bytes(image).permute(1, 2, 0).cpu()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000


@register("jpeg_compressibility", RewardCard("minus kB as JPEG", 1.0, DDPO), sign=-1, range=(-math.inf, 0.0))
@register("jpeg_incompressibility", RewardCard("kB as JPEG", 1.0, DDPO), sign=1, range=(0.0, math.inf))
@dataclass(frozen=True)
class JpegReward:
    """Score images by ``sign`` times their JPEG size in kB; ignores prompts."""

    name: str
    sign: int
    range: tuple[float, float]
    differentiable: bool = False

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32, kB, on the CPU."""
        return torch.tensor([self.sign * jpeg_kilobytes(image) for image in images], dtype=torch.float32)
