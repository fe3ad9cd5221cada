"""Scenes of coloured shapes, and random scenes for a specification."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 38),
    "green": (44, 160, 74),
    "blue": (40, 84, 214),
    "yellow": (246, 208, 42),
    "purple": (148, 52, 188),
    "cyan": (44, 196, 214),
}
BACKGROUND = (236, 236, 232)
RELATIONS = ("left of", "right of", "above", "below")
SIZE = 64  # pixels, both ways
MAX_OBJECTS = 4

# Held out of training: no caption names these together. Pictures may show them, where the caption leaves it open.
HELD_OUT_PAIRS = frozenset({("red", "triangle"), ("green", "circle"), ("purple", "square")})
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "left of", "square"),
        ("square", "above", "triangle"),
        ("triangle", "right of", "circle"),
        ("circle", "below", "triangle"),
        ("square", "right of", "circle"),
        ("triangle", "left of", "square"),
    }
)
HELD_OUT_DIRECTIONS = frozenset(
    {
        ("red", "left of"), ("green", "above"), ("blue", "right of"),
        ("yellow", "below"), ("purple", "above"), ("cyan", "left of"),
    }
)  # fmt: skip
HELD_OUT_COLORS = frozenset({frozenset({"red", "cyan"}), frozenset({"green", "purple"}), frozenset({"blue", "yellow"})})

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Object:
    """One shape: its centre and its circumscribed radius, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def relation_between(a: tuple[float, float], b: tuple[float, float], reach: float) -> set[str]:
    """Determine the position of ``a`` relative to ``b`` by GenEval's rule.

    Offsets shorter than a tenth of ``reach`` (the summed box sizes) do not count; a direction counts when it holds more
    than half of the remaining offset. Zero, one or two names of RELATIONS. Source: GenEval, arXiv 2310.11513.
    """
    offset = [a[i] - b[i] for i in (0, 1)]
    offset = [math.copysign(max(abs(o) - 0.1 * reach, 0.0), o) for o in offset]
    length = math.hypot(*offset)
    if length < 1e-3:
        return set()
    dx, dy = (o / length for o in offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def scene_for(spec: Spec, rng: random.Random) -> tuple[Object, ...]:
    """Draw a scene that shows exactly the objects of ``spec``; no two of its items share a colour."""
    kinds: list[tuple[str, str]] = []
    free = [c for c in COLORS if all(c != item.get("color") for item in spec["include"])]
    rng.shuffle(free)
    for item in spec["include"]:
        kinds += [(item["class"], item.get("color") or free.pop())] * item["count"]
    relation = next((item["position"][0] for item in spec["include"] if "position" in item), None)
    objects = draw_scene(kinds, rng)
    while relation is not None and not _clearly(objects[1], relation, objects[0]):
        objects = draw_scene(kinds, rng)
    return objects


def draw_scene(kinds: Sequence[tuple[str, str]], rng: random.Random) -> tuple[Object, ...]:
    """Place shapes of (shape, color) at random, apart from each other."""
    low, high = (9.0, 13.0) if len(kinds) <= 2 else (7.5, 9.5)
    while True:
        objects: list[Object] = []
        for shape, color in kinds:
            radius = rng.uniform(low, high)
            x, y = (rng.uniform(radius + 1.5, SIZE - radius - 1.5) for _ in range(2))
            objects.append(Object(shape, color, x, y, radius))
        if _apart(objects):
            return tuple(objects)


def _apart(objects: Sequence[Object]) -> bool:
    pairs = [(a, b) for i, a in enumerate(objects) for b in objects[:i]]
    return all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2.5 for a, b in pairs)


def _clearly(a: Object, relation: str, b: Object) -> bool:
    """Test a relation with a narrower cone than GenEval's, which keeps scenes away from the verifier's boundary."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 1.3 * abs(across)
