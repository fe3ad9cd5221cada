"""Verify an image: detect its coloured shapes, and compare them with the specification of a caption.

Pixels are assigned to the nearest palette colour, connected components are found with scipy, and a component's shape is
the one whose outline, drawn into the component's box, overlaps it best. Correctness follows GenEval (arXiv 2310.11513).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from diffalign.shapes.render import outline_distance
from diffalign.shapes.scene import BACKGROUND, COLORS, SHAPES, Spec, relation_between

PALETTE = torch.tensor([BACKGROUND, *COLORS.values()], dtype=torch.float32) / 255
COLOR_TOLERANCE = 0.35  # distance in RGB beyond which a pixel belongs to no colour (edges, mixtures)
MIN_AREA = 30  # pixels; the smallest shape drawn, a triangle, covers 73
MIN_OVERLAP = 0.66  # intersection over union with the best outline below which a blob is no shape
TEMPLATE = 24  # pixels


@dataclass(frozen=True)
class Found:
    """One connected component. ``shape`` is None for a blob that is no known shape; ``overlap`` in [0, 1]."""

    shape: str | None
    color: str
    x: float
    y: float
    reach: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """Result of a verification.

    Attributes:
        correct: GenEval's rule: extra objects are allowed except when counting.
        strict: The image shows exactly the objects of the specification.
        score: Graded, in [0, 1]; 1 if and only if strict.
    """

    correct: bool
    strict: bool
    score: float
    objects: tuple[Found, ...]


def _templates() -> np.ndarray:
    """Draw each outline stretched to fill its box, as components are: (shapes, TEMPLATE, TEMPLATE), bool."""
    masks = []
    for shape in SHAPES:
        axis = torch.linspace(-40, 40, 1601)
        inside = (outline_distance(shape, axis[None, :], axis[:, None], torch.tensor(30.0)) <= 0).numpy()
        rows, columns = (np.flatnonzero(inside.any(a)) for a in (1, 0))
        box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        masks.append(_resample(box))
    return np.stack(masks)


def _resample(mask: np.ndarray) -> np.ndarray:
    index = [((np.arange(TEMPLATE) + 0.5) * n / TEMPLATE).astype(int) for n in mask.shape]
    return mask[np.ix_(*index)]


_OUTLINES = _templates()


def nearest_colors(images: Tensor) -> np.ndarray:
    """Find the colour of each pixel of images (B, 3, H, W), [0, 1]: (B, H, W) uint8, indices into COLORS plus 1.

    0 is the background, and pixels close to no colour.
    """
    # A plane per colour, so that the memory format of the images does not matter.
    pixels = images.detach().float().clamp(0, 1).contiguous()
    palette = PALETTE.to(pixels.device)
    distance = torch.stack([(pixels - color[:, None, None]).square().sum(1) for color in palette], dim=1)
    least, nearest = distance.min(1)
    return torch.where(least < COLOR_TOLERANCE**2, nearest, 0).to(torch.uint8).cpu().numpy()


def find_objects(nearest: np.ndarray) -> tuple[Found, ...]:
    """List the coloured components of an image, (H, W) as from ``nearest_colors``, largest first."""
    pixels = np.bincount(nearest.ravel(), minlength=len(PALETTE))
    found: list[tuple[int, Found]] = []
    for index, color in enumerate(COLORS, start=1):
        if pixels[index] < MIN_AREA:
            continue
        labels, _ = ndimage.label(nearest == index)
        areas = np.bincount(labels.ravel())
        for label, window in enumerate(ndimage.find_objects(labels), start=1):
            if areas[label] >= MIN_AREA:
                found.append((int(areas[label]), _describe(labels[window] == label, window, color)))
    return tuple(f for _, f in sorted(found, key=lambda pair: -pair[0]))


def _describe(mask: np.ndarray, window: tuple[slice, ...], color: str) -> Found:
    height, width = mask.shape
    fitted = _resample(mask)
    overlap = (_OUTLINES & fitted).sum((1, 2)) / (_OUTLINES | fitted).sum((1, 2))
    best = int(overlap.argmax())
    upright = 0.6 < width / height < 1.7
    shape = SHAPES[best] if upright and overlap[best] >= MIN_OVERLAP else None
    y, x = (s.start + n / 2 for s, n in zip(window, mask.shape, strict=True))
    return Found(shape, color, x, y, float(height + width), float(overlap[best]))


def judge(objects: tuple[Found, ...], spec: Spec) -> Verdict:
    """Compare the objects of an image with ``spec``, in GenEval's metadata format."""
    credits, located = [], []
    for entry in spec["include"]:
        alike = [o for o in objects if o.shape == entry["class"]]
        exact = [o for o in alike if o.color == entry.get("color", o.color)]
        located.append(exact)
        credits.append(min(len(exact), entry["count"]) / entry["count"])
        if "color" in entry:
            credits.append(min(len(alike), entry["count"]) / entry["count"])
        if "position" in entry:
            relation, other = entry["position"]
            credits.append(float(_holds(exact, relation, located[other])))
    wanted = sum(entry["count"] for entry in spec["include"])
    complete = all(c == 1 for c in credits)
    too_many = any(
        sum(o.shape == e["class"] and o.color == e.get("color", o.color) for o in objects) >= e["count"]
        for e in spec.get("exclude", ())
    )
    score = float(np.mean(credits)) * wanted / max(wanted, len(objects))
    return Verdict(complete and not too_many, complete and len(objects) == wanted, score, objects)


def _holds(subjects: Sequence[Found], relation: str, others: Sequence[Found]) -> bool:
    return any(
        relation in relation_between((a.x, a.y), (b.x, b.y), (a.reach + b.reach) / 2)
        for a in subjects[:1]
        for b in others[:1]
    )


def judge_batch(images: Tensor, specs: Sequence[Spec]) -> list[Verdict]:
    """Judge each image of a batch (B, 3, H, W) in [0, 1], on any device and of any float dtype."""
    return [judge(find_objects(found), spec) for found, spec in zip(nearest_colors(images), specs, strict=True)]
