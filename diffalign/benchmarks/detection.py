"""Score places and numbers of objects by a detector, with the formulas of T2I-CompBench++ (arXiv 2307.06350).

UniDet_eval/2D_spatial_eval.py and numeracy_eval.py at Karine-Huang/T2I-CompBench@1b70949. Departures: the detector is
that of the reward ``geneval`` (COCO's 80 classes) instead of UniDet; a class that it does not know counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata
from diffalign.rewards.geneval import DETECTOR, Found, detect, load_detector
from diffalign.rewards.support.preprocess import on_images
from diffalign.rewards.support.weights import Weights, load_once, on_device

IOU, DISTANCE = 0.1, 150  # thresholds of the published code; the distance in pixels
LEAST = 0.5  # spatial scores below become 0
SAME = 0.9  # overlap from which two boxes of a class are one object
CONFIDENCE = 0.3  # minimum of a detection; that of UniDet's configuration is not known
Box = tuple[float, float, float, float]


def area(box: Box) -> float:
    """Return the area of a box (left, top, right, bottom)."""
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def placed(relation: str, a: Box, b: Box) -> float:
    """Return how well the place of ``a`` fits ``relation`` to ``b``, [0, 1]."""
    x, y = ((b[low] + b[low + 2] - a[low] - a[low + 2]) / 2 for low in (0, 1))
    iou = overlap(a, b) / (area(a) + area(b) - overlap(a, b))
    if relation in ("next to", "on side of", "near"):
        close = abs(x) < DISTANCE or abs(y) < DISTANCE
        return 1.0 if close else DISTANCE / max(abs(x), abs(y))
    along, across = {
        "on the right of": (-x, y),
        "on the left of": (x, y),
        "on the bottom of": (-y, x),
        "on the top of": (y, x),
    }.get(relation, (0.0, 0.0))
    if along <= abs(across):
        return 0.0
    return 1.0 if iou < IOU else IOU / iou


def instances(objects: Mapping[str, Sequence[Found]], name: str) -> Sequence[Found]:
    """Return the objects of a class, also by the last word of its name: "phone" for "cell phone"."""
    known = name if name in objects else next((one for one in objects if one.split()[-1] == name), name)
    return objects.get(known, ())


def spatial(objects: Mapping[str, Sequence[Found]], names: Sequence[str], relation: str) -> float:
    """Return .25 of each object's confidence plus .5 of the relation; 0 below ``LEAST``."""
    first, second = (next(iter(instances(objects, name)), None) for name in names)
    score = 0.25 * sum(found.score for found in (first, second) if found is not None)
    if first is not None and second is not None:
        score += 0.5 * placed(relation, first.box, second.box)
    return score if score >= LEAST else 0.0


def counted(objects: Mapping[str, Sequence[Found]], counts: Mapping[str, int]) -> float:
    """Return the mean over classes of .5 for a detection plus .5 for the right number."""
    numbers = {name: len(_distinct(instances(objects, name))) for name in counts}
    credit = [0.5 * (numbers[name] > 0) + 0.5 * (numbers[name] == wanted > 0) for name, wanted in counts.items()]
    return sum(credit) / len(credit)


def _distinct(found: Sequence[Found]) -> list[Found]:
    kept: list[Found] = []
    for one in found:
        if not any(_same(one.box, other.box) for other in kept):
            kept.append(one)
    return kept


def _same(a: Box, b: Box) -> bool:
    """Compare boxes as the published code does, whose sides count a pixel more."""
    wide = [(box[0], box[1], box[2] + 1, box[3] + 1) for box in (a, b)]
    shared = overlap(wide[0], wide[1])
    union = area(wide[0]) + area(wide[1]) - shared
    return max(shared / union, shared / area(wide[0]), shared / area(wide[1])) > SAME


class CompositionDetector:
    """Score images by "objects" and "relation", or by "counts", in the metadata of their prompt, [0, 1]."""

    differentiable = False
    range = (0.0, 1.0)

    def __init__(
        self, name: str = "composition", path: str = DETECTOR, revision: str | None = None, precision: str = "no"
    ) -> None:
        """Name the detector's weights, as for the reward ``geneval``."""
        self.name, self.weights = name, Weights(path, revision, precision)

    @on_images()
    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""
        detector, processor = load_once(load_detector, self.weights)
        with on_device(detector, self.weights, images.device):
            found = [detect(detector, processor, image, CONFIDENCE) for image in images]
        return torch.tensor([_score(one, data) for one, data in zip(found, metadata, strict=True)])


def _score(objects: Mapping[str, Sequence[Found]], data: Mapping[str, Any]) -> float:
    if "counts" in data:
        return counted(objects, data["counts"])
    return spatial(objects, data["objects"], data["relation"])
