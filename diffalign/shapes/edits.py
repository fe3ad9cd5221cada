"""Edits of scenes: instructions that recolour a shape or add one, and a verifier that compares result and source.

An edit is ``{"kind": "recolor", "class", "color", "to"}`` or ``{"kind": "add", "class", "color"}``. The verifier finds
the objects of the source, applies the edit to that list, and looks for exactly these objects in the result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.shapes.scene import COLORS, SHAPES, Object, draw_scene
from diffalign.shapes.verifier import Found, find_objects, nearest_colors

Edit = Mapping[str, Any]
KINDS = ("recolor", "add")
WORDINGS = {
    "recolor": (
        "make the {color} {class} {to}",
        "change the {color} {class} to {to}",
        "turn the {color} {class} {to}",
        "paint the {color} {class} {to}",
    ),
    "add": ("add a {color} {class}", "draw a {color} {class}", "put a {color} {class} in the picture"),
}
MAX_SHIFT = 3.0  # pixels that an object may move and still count as unchanged
MAX_GROWTH = 1.3  # ratio of box sizes within which its size counts as unchanged
MARGIN = 3.0  # pixels around an edited object that do not count as unedited


@dataclass(frozen=True)
class EditVerdict:
    """Result of verifying an edit.

    Attributes:
        correct: The result shows exactly the objects of the edited source, each in its place.
        score: Graded, in [0, 1]; 1 if and only if correct.
        difference: Mean absolute difference of pixels outside the edited object, in [0, 1].
    """

    correct: bool
    score: float
    difference: float

    @property
    def kept(self) -> float:
        """1 minus the difference."""
        return 1 - self.difference


def phrase(edit: Edit, rng: random.Random) -> str:
    """Word an edit as an instruction, e.g. ``change the red circle to blue``."""
    return rng.choice(WORDINGS[edit["kind"]]).format(**edit)


def vocabulary() -> list[str]:
    """List every word of all instructions, sorted."""
    fixed = {word for texts in WORDINGS.values() for text in texts for word in text.split() if "{" not in word}
    return sorted({*fixed, *COLORS, *SHAPES})


def random_edit(rng: random.Random) -> tuple[tuple[Object, ...], Edit, tuple[Object, ...]]:
    """Draw a scene of one to three shapes of different colours, an edit, and the edited scene."""
    kind = rng.choice(KINDS)
    colors = rng.sample(list(COLORS), rng.randint(1, 3) + 1)
    kinds = [(rng.choice(SHAPES), color) for color in colors]
    if kind == "add":
        after = draw_scene(kinds, rng)
        added = after[-1]
        return after[:-1], {"kind": kind, "class": added.shape, "color": added.color}, after
    before, new = draw_scene(kinds[:-1], rng), colors[-1]
    chosen = rng.randrange(len(before))
    edit = {"kind": kind, "class": before[chosen].shape, "color": before[chosen].color, "to": new}
    return before, edit, tuple(replace(o, color=new) if i == chosen else o for i, o in enumerate(before))


def wrong_edit(edit: Edit, scene: Sequence[Object], rng: random.Random) -> Edit:
    """Change one word of an edit's outcome: another colour that the scene lacks, or another shape to add."""
    free = [c for c in COLORS if c not in {o.color for o in scene} | {edit["color"], edit.get("to")}]
    if edit["kind"] == "recolor":
        return {**edit, "to": rng.choice(free)}
    if rng.random() < 0.5:
        return {**edit, "color": rng.choice(free)}
    return {**edit, "class": rng.choice([s for s in SHAPES if s != edit["class"]])}


def apply_edit(objects: Sequence[Found], edit: Edit) -> tuple[list[Found], Found | None]:
    """Return the objects that must be unchanged, and the one to recolour as it must become; None for an added one.

    Raises:
        ValueError: The source does not show exactly one object of the edit's colour and class to recolour.
    """
    if edit["kind"] == "add":
        return list(objects), None
    chosen = [o for o in objects if (o.shape, o.color) == (edit["class"], edit["color"])]
    if len(chosen) != 1:
        raise ValueError(f"the source shows {len(chosen)} objects {edit['color']} {edit['class']}, not one to recolour")
    return [o for o in objects if o is not chosen[0]], replace(chosen[0], color=edit["to"])


def judge_edit(source: tuple[Found, ...], result: tuple[Found, ...], edit: Edit) -> tuple[bool, float, list[Found]]:
    """Compare the objects of result and source: whether the edit is correct, its score, and the edited objects."""
    kept, target = apply_edit(source, edit)
    rest = list(result)
    unchanged = sum(_take(rest, k.shape, k.color, k) for k in kept)
    edited = [o for o in (*rest, target) if o is not None]

    if target is not None:
        shape = any(o.shape == target.shape and _in_place(o, target) for o in rest)
        done = _take(rest, target.shape, target.color, target)
    else:
        shape = any(o.shape == edit["class"] for o in rest)
        done = _take(rest, edit["class"], edit["color"], None)

    credits = [float(shape), float(done), *([1.0] * unchanged + [0.0] * (len(kept) - unchanged))]
    wanted = len(kept) + 1
    correct = all(credits) and len(result) == wanted
    score = sum(credits) / len(credits) * wanted / max(wanted, len(result))
    return correct, score, edited


def _take(objects: list[Found], shape: str | None, color: str, place: Found | None) -> bool:
    """Remove the first object of a shape and colour, in the place of another if given; return whether there is one."""
    alike = (o for o in objects if (o.shape, o.color) == (shape, color))
    found = next((o for o in alike if place is None or _in_place(o, place)), None)
    if found is not None:
        objects.remove(found)
    return found is not None


def _in_place(a: Found, b: Found) -> bool:
    growth = max(a.reach, b.reach) / min(a.reach, b.reach)
    return math.hypot(a.x - b.x, a.y - b.y) <= MAX_SHIFT and growth <= MAX_GROWTH


def unedited(edited: Sequence[Found], size: tuple[int, int]) -> Tensor:
    """Mark the pixels outside the boxes of edited objects: (H, W), bool."""
    mask = torch.ones(size, dtype=torch.bool)
    for o in edited:
        half = o.reach / 4 + MARGIN
        top, left = max(int(o.y - half), 0), max(int(o.x - half), 0)
        mask[top : math.ceil(o.y + half), left : math.ceil(o.x + half)] = False
    return mask


def judge_edits(sources: Tensor, results: Tensor, edits: Sequence[Edit]) -> list[EditVerdict]:
    """Verify edited images.

    Args:
        sources: (B, 3, H, W), in [0, 1], of any float dtype.
        results: (B, 3, H, W), of the same size.
        edits: B edits.
    """
    verdicts = []
    before, after = (nearest_colors(images) for images in (sources, results))
    for i, edit in enumerate(edits):
        correct, score, edited = judge_edit(find_objects(before[i]), find_objects(after[i]), edit)
        mask = unedited(edited, (results.shape[-2], results.shape[-1]))
        distance = (results[i].detach().float().cpu() - sources[i].detach().float().cpu()).abs().mean(0)
        difference = distance[mask].mean().item() if mask.any() else 0.0
        verdicts.append(EditVerdict(correct, score, difference))
    return verdicts
