"""Render scenes in batches with torch, antialiased by the signed distance to each outline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.shapes.scene import BACKGROUND, COLORS, MAX_OBJECTS, SHAPES, SIZE, Object


def outline_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Compute the signed distance to the outline, negative inside; ``dx``, ``dy`` from the centre, y downwards.

    Each shape fits a circle of ``radius``; the square is larger than the one inscribed, so that areas match.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - 0.92 * radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.8 * radius
    side = 0.75**0.5 * dx.abs() - 0.5 * dy - 0.5 * radius
    return torch.maximum(dy - 0.5 * radius, side)


def render(scenes: Sequence[Sequence[Object]], size: int = SIZE) -> Tensor:
    """Render scenes to images (B, 3, size, size), float32 in [0, 1]. Later objects cover earlier ones."""
    scale = size / SIZE
    count = len(scenes)
    table = torch.zeros(count, MAX_OBJECTS, 3)
    kind = torch.full((count, MAX_OBJECTS), -1)
    paint = torch.zeros(count, MAX_OBJECTS, 3)
    for i, scene in enumerate(scenes):
        for j, o in enumerate(scene):
            table[i, j] = torch.tensor((o.x * scale, o.y * scale, o.radius * scale))
            kind[i, j] = SHAPES.index(o.shape)
            paint[i, j] = torch.tensor(COLORS[o.color]) / 255
    axis = torch.arange(size) + 0.5
    image = (torch.tensor(BACKGROUND) / 255).view(1, 3, 1, 1).repeat(count, 1, size, size)
    for j in range(max(map(len, scenes), default=0)):
        for index, shape in enumerate(SHAPES):
            rows = (kind[:, j] == index).nonzero().flatten()
            if len(rows):
                x, y, radius = table[rows, j].view(-1, 3, 1, 1).unbind(1)
                distance = outline_distance(shape, axis.view(1, 1, -1) - x, axis.view(1, -1, 1) - y, radius)
                cover = (0.5 - distance).clamp(0, 1)[:, None]
                image[rows] += cover * (paint[rows, j].view(-1, 3, 1, 1) - image[rows])
    return image
