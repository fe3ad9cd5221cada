import math
import random

import pytest

from diffalign.shapes import TAGS, caption, scene_for
from diffalign.shapes.scene import COLORS, SHAPES, SIZE, relation_between


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-20, 0), {"left of"}),
        ((20, 0), {"right of"}),
        ((0, -20), {"above"}),
        ((0, 20), {"below"}),
        ((20, 20), {"right of", "below"}),
        ((-20, -20), {"left of", "above"}),
        ((0, 0), set()),
        ((3.9, -3.9), set()),  # shorter than a tenth of 40
        ((-20, 3.9), {"left of"}),
        # What is left of the offset is (16, 8): the sine of its angle is 0.447; with (16, 10) it is 0.53.
        ((20, 12), {"right of"}),
        ((12, 20), {"below"}),
        ((20, 14), {"right of", "below"}),
    ],
)
def test_relations_by_hand(offset, expected):
    a, b = (30 + offset[0], 30 + offset[1]), (30, 30)
    assert relation_between(a, b, reach=40) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relation_between(b, a, reach=40) == {opposite[name] for name in expected}


def draw(tag, held_out, count=60):
    rng = random.Random(f"{tag}{held_out}")
    prompts = [caption(rng, tag, held_out=held_out) for _ in range(count)]
    return [(p.metadata, scene_for(p.metadata, rng)) for p in prompts]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("tag", TAGS)
def test_a_scene_shows_exactly_what_is_asked_for(tag, held_out):
    for spec, scene in draw(tag, held_out):
        assert [o.shape for o in scene] == [e["class"] for e in spec["include"] for _ in range(e["count"])]
        for entry in spec["include"]:
            colors = {o.color for o in scene if o.shape == entry["class"]}
            assert colors <= ({entry["color"]} if "color" in entry else set(COLORS))
        for o in scene:
            assert min(o.x, o.y, SIZE - o.x, SIZE - o.y) > o.radius + 1
        for i, a in enumerate(scene):
            assert all(math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius + 2 for b in scene[:i])


def test_what_a_caption_leaves_open_is_drawn_in_every_colour_and_no_two_items_share_one():
    scenes = [(spec, scene) for tag in TAGS for spec, scene in draw(tag, held_out=False)]
    assert {(o.color, o.shape) for _, scene in scenes for o in scene} == {(c, s) for c in COLORS for s in SHAPES}
    assert all(len({o.color for o in scene}) == len(spec["include"]) for spec, scene in scenes)


def test_a_scene_is_a_function_of_the_generator():
    spec = {"include": [{"class": "circle", "count": 3}]}
    assert scene_for(spec, random.Random(1)) == scene_for(spec, random.Random(1)) != scene_for(spec, random.Random(2))
