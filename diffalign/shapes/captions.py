"""Captions in GenEval's six task types, with their specification in GenEval's metadata format.

A specification is ``{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?: [...]}``, ``position``
``[relation, index of the other item]``. Single objects, pairs and counts hold out wordings; colours, positions and
colour attributions hold out combinations, which no training caption names: of a colour and a shape, of two shapes and
their relation, of a colour and a relation, and of two colours.
Source of tasks and format: GenEval, arXiv 2310.11513.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice

from diffalign.shapes.scene import (
    COLORS,
    HELD_OUT_COLORS,
    HELD_OUT_DIRECTIONS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    Spec,
)
from diffalign.structures import Prompt

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
NOUNS = (
    "a photo", "a picture", "a drawing", "an image", "a painting", "a sketch", "a print", "a poster",
    "a card", "an icon", "a sign", "a figure", "a graphic", "an illustration", "a sticker", "a diagram",
)  # fmt: skip
OPENINGS = ("", *(f"{noun} {link} " for link in ("of", "with", "showing") for noun in NOUNS))
OUTER = tuple(f"{noun} of " for noun in NOUNS)


def item(shape: str, count: int = 1, color: str | None = None, position: list | None = None) -> dict:
    """Make one entry of a specification's ``include`` list."""
    optional = {"color": color, "position": position}
    return {"class": shape, "count": count, **{k: v for k, v in optional.items() if v is not None}}


def phrase(spec: Spec) -> str:
    """Word a specification plainly, e.g. ``a red circle and a blue square``."""
    first, *rest = spec["include"]
    if "position" in (rest[0] if rest else {}):
        return f"{_name(rest[0])} {rest[0]['position'][0]} {_name(first)}"
    return " and ".join(map(_name, spec["include"]))


def _name(entry: Spec) -> str:
    color = f"{entry['color']} " if "color" in entry else ""
    if entry["count"] == 1:
        return f"a {color}{entry['class']}"
    return f"{NUMBERS[entry['count']]} {color}{entry['class']}s"


@cache
def specs(tag: str) -> tuple[Spec, ...]:
    """List every specification of one task type."""
    other = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    pairs = [(c, s) for s in SHAPES for c in COLORS]
    if tag == "counting":
        counts = [(s, n) for s in SHAPES for n in range(2, MAX_OBJECTS + 1)]
        return tuple({"tag": tag, "include": [item(s, n)], "exclude": [item(s, n + 1)]} for s, n in counts)
    includes = {
        "single_object": [[item(s)] for s in SHAPES],
        "two_object": [[item(a), item(b)] for a, b in other],
        "colors": [[item(s, color=c)] for c, s in pairs],
        "position": [
            [item(b, color=d), item(a, color=c, position=[r, 0])]
            for a, b in other
            for r in RELATIONS
            for c, d in ((None, None), *((c, None) for c in COLORS), *((None, c) for c in COLORS))
            # A test of a colour's place is about shapes whose relation is known.
            if c is d is None or ((a, r, b) not in HELD_OUT_RELATIONS and not {(c, a), (d, b)} & HELD_OUT_PAIRS)
        ],
        "color_attr": [
            [item(s, color=c), item(t, color=d)] for c, s in pairs for d, t in pairs if c != d and s != t
        ],
    }  # fmt: skip
    return tuple({"tag": tag, "include": include} for include in includes[tag])


def is_novel(spec: Spec) -> bool:
    """Return whether a specification contains a held-out combination."""
    items = spec["include"]
    named = {i["color"] for i in items if "color" in i}
    if named in HELD_OUT_COLORS or any((i.get("color"), i["class"]) in HELD_OUT_PAIRS for i in items):
        return True
    if spec["tag"] != "position":
        return False
    reference, subject = items
    relation = subject["position"][0]
    return (subject["class"], relation, reference["class"]) in HELD_OUT_RELATIONS or any(
        (color, relation) in HELD_OUT_DIRECTIONS for color in named
    )


def is_held_out(spec: Spec, opening: str) -> bool:
    """Return whether a caption is held out: by its combination if its task has one, else by its wording."""
    if spec["tag"] in ("colors", "position", "color_attr"):
        return is_novel(spec)
    return opening != "" and (specs(spec["tag"]).index(spec) + OPENINGS.index(opening)) % 2 == 0


def neighbours(spec: Spec) -> list[Spec]:
    """List specifications of the same task that differ in one word of the same kind and are not held out."""

    def changes(other: Spec) -> int:
        pairs = list(zip(spec["include"], other["include"], strict=True))
        same_kinds = all(a.keys() == b.keys() for a, b in pairs)
        return sum(a[key] != b[key] for a, b in pairs for key in a) if same_kinds else 0

    return [other for other in specs(spec["tag"]) if changes(other) == 1 and not is_novel(other)]


def caption(rng: random.Random, tag: str | None = None, *, held_out: bool = False, plain: float = 0.3) -> Prompt:
    """Draw a caption from one side of the split; ``plain`` is the share without an opening such as "a photo of"."""
    tag = tag or rng.choice(TAGS)
    while True:
        spec = rng.choice(specs(tag))
        opening = "" if rng.random() < plain else rng.choice(OPENINGS[1:])
        if is_held_out(spec, opening) == held_out:
            return Prompt(opening + phrase(spec), spec)


def prompt_set(per_tag: int, *, held_out: bool, seed: int, repeat: bool = False) -> list[Prompt]:
    """Draw ``per_tag`` captions of every task type from one side of the split.

    Captions are distinct, unless ``repeat`` allows a task with fewer captions to repeat them. ValueError: too few.
    """
    rng = random.Random(seed)
    every: list[Prompt] = []
    for tag in TAGS:
        available = sum(is_held_out(spec, opening) == held_out for spec in specs(tag) for opening in OPENINGS)
        if per_tag > available and not repeat:
            raise ValueError(f"{tag} has {available} captions on this side, not {per_tag}: ask for fewer per tag")
        found: dict[str, Prompt] = {}
        while len(found) < min(per_tag, available):
            prompt = caption(rng, tag, held_out=held_out)
            found.setdefault(prompt.text, prompt)
        every += islice(cycle(found.values()), per_tag)
    return every


def combination(spec: Spec) -> frozenset[tuple[object, ...]]:
    """Return what a specification asks for; two that name the same items in another order are equal."""
    entries = [(i["class"], i["count"], i.get("color"), *i.get("position", ())) for i in spec["include"]]
    return frozenset(entries)


def disjoint_prompt_set(per_tag: int, *, seed: int, others: Sequence[Prompt]) -> list[Prompt]:
    """Draw ``per_tag`` held-out captions of every task type, none of them in ``others``.

    Positions and colour attributions name other combinations than ``others``. The remaining tasks have three to nine
    combinations, which ``others`` may name too, in other words. The 72 held-out wordings of single objects are too few
    for two sets: here they stand behind a second opening, "a photo of a drawing with a circle". ValueError: too few.
    """
    rng = random.Random(seed)
    texts, named = {p.text for p in others}, {combination(p.metadata) for p in others}
    every: list[Prompt] = []
    for tag in TAGS:
        distinct = tag in ("position", "color_attr")
        free = [spec for spec in specs(tag) if not distinct or combination(spec) not in named]
        outer = OUTER if tag == "single_object" else ("",)
        wordings = {o + i + phrase(spec) for spec in free for i in OPENINGS if is_held_out(spec, i) for o in outer}
        available = wordings - texts
        if per_tag > len(available):
            raise ValueError(f"{tag} has {len(available)} captions apart from others, not {per_tag}: ask for fewer")
        found: dict[str, Prompt] = {}
        while len(found) < per_tag:
            prompt = caption(rng, tag, held_out=True)
            text = rng.choice(outer) + prompt.text
            if text in available:
                found.setdefault(text, Prompt(text, prompt.metadata))
        every += found.values()
    return every


def vocabulary() -> list[str]:
    """List every word of all captions, sorted."""
    texts = list(OPENINGS) + [phrase(s) for tag in TAGS for s in specs(tag)]
    return sorted({word for text in texts for word in text.split()})
