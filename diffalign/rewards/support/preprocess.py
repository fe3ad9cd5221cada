"""The published preprocessing of the reward models, as tensor operations: a gradient reaches the image.

Most models were published with PIL, which resizes 8-bit pixels in two passes (columns, then rows) and rounds and clips
after each. ``quantize`` follows it, with the gradient of the smooth resize (straight-through); without it the resize
itself is smooth, and scores differ a little: the gap is in the README. Since version 13, Pillow resizes rows first
where the height shrinks much more than the width; published scores are older, so here columns always come first.
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
# A picture larger than this on its longer side is more likely a mistake than an image to judge.
MAX_SIDE = 16384
# Pixels beyond are not in [0, 1] but in [0, 255] or [-1, 1]; a decoder's small overshoot is let pass.
LOWEST, HIGHEST = -0.5, 1.5

Size = tuple[int, int]


def to_bytes(images: Tensor) -> Tensor:
    """``round8`` as uint8, without a graph."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8)


def round8(pixels: Tensor) -> Tensor:
    """The nearest of the 256 levels in [0, 1], halves upwards as PIL has them."""
    return (pixels.clamp(0, 1) * 255 + 0.5).floor() / 255


def resize(images: Tensor, size: Size, *, quantize: bool) -> Tensor:
    """Bicubic with antialiasing to (height, width), within [0, 1]; B x 3 x H x W in and out.

    quantize: PIL's own result, rounding included; its gradient is that of the smooth resize.
    """
    if not quantize:
        return _bicubic(images, size).clamp(0, 1)
    with torch.no_grad():
        columns = round8(_bicubic(round8(images), (images.shape[-2], size[1])))
        exact = round8(_bicubic(columns, size))
    return straight_through(_bicubic(images, size).clamp(0, 1), exact) if wants_grad(images) else exact


def straight_through(smooth: Tensor, exact: Tensor) -> Tensor:
    """The value of ``exact`` with the gradient of ``smooth``."""
    return smooth + (exact - smooth).detach()


def should_quantize(quantize: bool | None, images: Tensor) -> bool:
    """Whether to round to 8 bits: as ``quantize`` says, or where no gradient is asked."""
    return not wants_grad(images) if quantize is None else quantize


def wants_grad(images: Tensor) -> bool:
    """Whether somebody will ask for the gradient with respect to ``images``."""
    return torch.is_grad_enabled() and images.requires_grad


def _bicubic(images: Tensor, size: Size) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def short_side(size: Size, goal: int) -> Size:
    """The shorter side becomes ``goal``, the longer one is cut to whole pixels."""
    height, width = size
    return (int(goal * height / width), goal) if width <= height else (goal, int(goal * width / height))


def stretch(size: Size, goal: int) -> Size:
    """Both sides become ``goal``: the picture is squeezed."""
    return goal, goal


def centre_floor(excess: int) -> int:
    """Where transformers' crop of a picture with ``excess`` more pixels begins."""
    return excess // 2


def centre_round(excess: int) -> int:
    """Where torchvision's crop begins: halves go to the even number."""
    return round(excess / 2)


def pad_square(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """The picture in the middle of a square of its longer side; ``colour`` in [0, 1] around it."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = images.new_tensor(colour).view(1, 3, 1, 1).repeat(len(images), 1, side, side)
    square[:, :, top : top + height, left : left + width] = images
    return square


@dataclass(frozen=True)
class Preprocess:
    """Pad or not, resize, crop, normalise: what one model was published with.

    goal: side of the square that the model sees, in pixels. fit: the size to resize to. crop: where the crop of a side
    begins, from its excess. through_pil: resized as 8-bit PIL images; else as float tensors, which overshoot [0, 1],
    and ``quantize`` rounds the input alone. pad: colour of the square that the picture is first put into; None for no
    padding. mean, std: per channel.
    """

    goal: int = 224
    fit: Callable[[Size, int], Size] = short_side
    crop: Callable[[int], int] = centre_floor
    through_pil: bool = True
    pad: tuple[float, float, float] | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Tensor, *, quantize: bool) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1], to (B, 3, goal, goal), float32 or wider, normalised.

        ValueError: another shape, pixels that are integers, a picture without pixels, or one whose resized or padded
        form would not fit into memory.
        """
        check_images(images)
        images = at_least_float32(images)
        if self.pad is not None:
            images = pad_square(images, self.pad)
        height, width = size = self.fit(tuple(images.shape[-2:]), self.goal)
        if max(size) > MAX_SIDE:
            raise ValueError(
                f"an image of {images.shape[-1]} x {images.shape[-2]} pixels would be resized to {width} x {height}: "
                "crop it first, such a strip cannot be judged"
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
    """In float32, or float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_images(images: Tensor) -> None:
    """ValueError where ``images`` are not (B, 3, H, W), float, [0, 1], with at least a pixel each.

    Values that are not finite are let pass: they concern one image, not the batch.
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


def on_images(*extras: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a pointwise reward's ``__call__``, or a function like it: what they all do before and after.

    What is no batch of images, or has another number of prompts, is refused (ValueError). A batch of none has no
    scores. An image with a pixel that is not finite has the score NaN, and costs the others nothing. extras: the names
    of the extras that the reward returns; none where it returns scores alone.
    """

    def decorate(score: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(score)
        def call(*arguments: Any) -> Any:
            *own, images, prompts, metadata = arguments
            check_images(images)
            if len(prompts) != len(images):
                raise ValueError(f"{len(images)} images for {len(prompts)} prompts: pass one prompt per image")
            if not len(images):
                none = images.new_zeros(0, dtype=torch.float32)
                return (none, dict.fromkeys(extras, none)) if extras else none
            finite = images.isfinite().flatten(1).all(1)
            if finite.all():
                return score(*arguments)
            result = score(*own, torch.where(finite.view(-1, 1, 1, 1), images, 0.0), prompts, metadata)
            if not extras:
                return _nan_outside(result, finite)
            return _nan_outside(result[0], finite), {
                name: _nan_outside(values, finite) for name, values in result[1].items()
            }

        return call

    return decorate


def _nan_outside(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` (B, ...) in ``rows`` (B,), NaN elsewhere."""
    return torch.where(rows.to(values.device).view(-1, *[1] * (values.ndim - 1)), values, math.nan)
