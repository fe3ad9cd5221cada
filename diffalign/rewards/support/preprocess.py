"""Published preprocessing of the reward models as differentiable tensor operations.

Most models were published with PIL, which resizes 8-bit pixels in two passes (columns, then rows) and rounds and clips
after each. ``quantize`` reproduces this, with the gradient of the smooth resize (straight-through); without it the
resize is smooth and scores differ slightly (the README of this folder has the gap). Since version 13, Pillow resizes
rows first if the height shrinks much more than the width; published scores are older, so columns always come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# A longer side is more likely a mistake than an image to score.
MAX_SIDE = 16384
# Pixels outside are in [0, 255] or [-1, 1]; a small overshoot of a decoder is accepted.
LOWEST, HIGHEST = -0.5, 1.5

Size = tuple[int, int]


def to_bytes(images: Tensor) -> Tensor:
    """Round to uint8 as ``round8`` does, detached."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8)


def round8(pixels: Tensor) -> Tensor:
    """Round to the nearest of 256 levels in [0, 1], halves up, as PIL does."""
    return (pixels.clamp(0, 1) * 255 + 0.5).floor() / 255


def resize(images: Tensor, size: Size, *, quantize: bool) -> Tensor:
    """Resize (B, 3, H, W) to (height, width), bicubic with antialiasing, clamped to [0, 1].

    quantize: reproduce PIL's rounding; the gradient is that of the smooth resize.
    """
    if not quantize:
        return _bicubic(images, size).clamp(0, 1)
    with torch.no_grad():
        columns = round8(_bicubic(round8(images), (images.shape[-2], size[1])))
        exact = round8(_bicubic(columns, size))
    return straight_through(_bicubic(images, size).clamp(0, 1), exact) if wants_grad(images) else exact


def straight_through(smooth: Tensor, exact: Tensor) -> Tensor:
    """Return the value of ``exact`` with the gradient of ``smooth``."""
    return smooth + (exact - smooth).detach()


def should_quantize(quantize: bool | None, images: Tensor) -> bool:
    """Whether to round to 8 bits: ``quantize``, or if it is None, unless a gradient is required."""
    return not wants_grad(images) if quantize is None else quantize


def wants_grad(images: Tensor) -> bool:
    """Whether autograd records operations on ``images``."""
    return torch.is_grad_enabled() and images.requires_grad


def _bicubic(images: Tensor, size: Size) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def short_side(size: Size, goal: int) -> Size:
    """Scale the shorter side to ``goal``; the longer side is rounded down."""
    height, width = size
    return (int(goal * height / width), goal) if width <= height else (goal, int(goal * width / height))


def stretch(size: Size, goal: int) -> Size:
    """Scale both sides to ``goal``, ignoring the aspect ratio."""
    return goal, goal


def centre_floor(excess: int) -> int:
    """Offset of transformers' centre crop for a side with ``excess`` surplus pixels."""
    return excess // 2


def centre_round(excess: int) -> int:
    """Offset of torchvision's centre crop: halves are rounded to even."""
    return round(excess / 2)


def pad_square(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """Centre images on a square of their longer side, filled with ``colour`` in [0, 1]."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = images.new_tensor(colour).view(1, 3, 1, 1).repeat(len(images), 1, side, side)
    square[:, :, top : top + height, left : left + width] = images
    return square


@dataclass(frozen=True)
class Preprocess:
    """Pad, resize, crop and normalise images as one model was published.

    Args:
        goal: side of the model's square input, in pixels.
        fit: computes the size to resize to.
        crop: computes the offset of the crop from the surplus pixels of a side.
        through_pil: resize as 8-bit PIL images; otherwise as float tensors, which may overshoot [0, 1], and
            ``quantize`` rounds only the input.
        pad: fill colour for padding to a square before the resize; None for no padding.
        mean: per channel.
        std: per channel.
    """

    goal: int = 224
    fit: Callable[[Size, int], Size] = short_side
    crop: Callable[[int], int] = centre_floor
    through_pil: bool = True
    pad: tuple[float, float, float] | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Tensor, *, quantize: bool) -> Tensor:
        """Convert images (B, 3, H, W), float, [0, 1], to (B, 3, goal, goal), float32 or wider, normalised.

        Raises ValueError for another shape, integer pixels, empty images, or a size too large after the resize.
        """
        check_images(images)
        images = at_least_float32(images)
        if self.pad is not None:
            images = pad_square(images, self.pad)
        height, width = size = self.fit((images.shape[-2], images.shape[-1]), self.goal)
        if max(size) > MAX_SIDE:
            raise ValueError(
                f"an image of {images.shape[-1]} x {images.shape[-2]} pixels would be resized to {width} x {height}: "
                "crop it first"
            )
        top, left = self.crop(height - self.goal), self.crop(width - self.goal)
        if self.through_pil:
            resized = resize(images, size, quantize=quantize)
        else:
            resized = _bicubic(straight_through(images, round8(images)) if quantize else images, size)
        resized = resized[..., top : top + self.goal, left : left + self.goal]
        mean, std = (resized.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (resized - mean) / std


def at_least_float32(values: Tensor) -> Tensor:
    """Convert to float32; float64 is kept."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` are (B, 3, H, W), float, in [0, 1], with at least one pixel.

    Non-finite pixels are accepted: they affect one image, not the batch.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}: pass (B, 3, H, W), see diffalign.rewards.as_images")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: pass floats in [0, 1], see diffalign.rewards.as_images")
    if 0 in images.shape[2:] or max(images.shape[2:]) > MAX_SIDE:
        raise ValueError(f"images of {images.shape[-1]} x {images.shape[-2]} pixels: 1 to {MAX_SIDE} on each side")
    if len(images):
        lowest, highest = (bound.item() for bound in images.detach().aminmax())
        if -math.inf < lowest < LOWEST or HIGHEST < highest < math.inf:
            raise ValueError(f"pixels from {lowest:.3g} to {highest:.3g}: pass floats in [0, 1]")


def on_samples(*extras: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``__call__`` of a latent reward as ``on_images`` does, without a check of channels and range."""
    return _on_batch(check_samples, extras)


def check_samples(samples: Tensor) -> None:
    """Raise ValueError unless ``samples`` are (B, C, ...), float, with at least one element each."""
    if samples.ndim < 3 or not samples.is_floating_point() or 0 in samples.shape[1:]:
        raise ValueError(
            f"samples are {samples.dtype} of shape {tuple(samples.shape)}: pass latents (B, C, ...) or images "
            "(B, 3, H, W), float"
        )


def on_images(*extras: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``__call__`` of a pointwise reward, or a reward function, with input checks.

    Raises ValueError for an invalid batch or another number of prompts. An empty batch returns empty scores. An image
    with non-finite pixels scores NaN, without effect on the others.

    Args:
        extras: names of the extras that the reward returns; none if it returns scores alone.
    """
    return _on_batch(check_images, extras)


def _on_batch(
    check: Callable[[Tensor], None], extras: tuple[str, ...]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(score: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(score)
        def call(*arguments: Any) -> Any:
            *own, images, prompts, metadata = arguments
            check(images)
            if len(prompts) != len(images):
                raise ValueError(f"{len(images)} images for {len(prompts)} prompts: pass one prompt per image")
            if not len(images):
                empty = images.new_zeros(0, dtype=torch.float32)
                return (empty, dict.fromkeys(extras, empty)) if extras else empty

            finite = images.isfinite().flatten(1).all(1)
            if finite.all():
                return score(*arguments)
            rows = finite.view(-1, *[1] * (images.ndim - 1))
            result = score(*own, torch.where(rows, images, 0.0), prompts, metadata)
            if not extras:
                return _nan_outside(result, finite)
            return _nan_outside(result[0], finite), {
                name: _nan_outside(values, finite) for name, values in result[1].items()
            }

        return call

    return decorate


def _nan_outside(values: Tensor, rows: Tensor) -> Tensor:
    """Return ``values`` (B, ...) where ``rows`` (B,) is true, NaN elsewhere."""
    return torch.where(rows.to(values.device).view(-1, *[1] * (values.ndim - 1)), values, math.nan)
