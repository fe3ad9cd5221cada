import random

import pytest
import torch

from diffalign.shapes import TAGS, Object, caption, judge_batch, render, scene_for
from diffalign.shapes.captions import item, specs
from diffalign.shapes.scene import COLORS, SHAPES, relation_between

SINGLE = {"include": [item("circle")]}
TWO = {"include": [item("circle"), item("square")]}
THREE = {"include": [item("circle", 3)], "exclude": [item("circle", 4)]}
RED = {"include": [item("circle", color="red")]}
LEFT = {"include": [item("square"), item("circle", position=["left of", 0])]}
ATTR = {"include": [item("circle", color="red"), item("square", color="blue")]}


def thing(shape, color, x, y, radius=8):
    return Object(shape, color, x, y, radius)


CIRCLE = thing("circle", "red", 14, 32)
SQUARE = thing("square", "blue", 50, 32)
TRIANGLE = thing("triangle", "cyan", 32, 52)
CIRCLES = [thing("circle", "red", x, y) for x, y in ((12, 12), (12, 52), (52, 12), (52, 52))]


def verdict(scene, spec):
    return judge_batch(render([scene]), [spec])[0]


def satisfied(scene, spec):
    """By the scene's own list of objects: whether it shows exactly ``spec``. None on the edge of a relation."""
    objects = list(scene)
    groups = []
    for entry in spec["include"]:
        group = [o for o in objects if o.shape == entry["class"] and o.color == entry.get("color", o.color)]
        groups.append(group)
        if len(group) != entry["count"]:
            return False
        if "position" in entry:
            relation, other = entry["position"]
            (a,), (b,) = group, groups[other]
            loose, tight = (relation_between((a.x, a.y), (b.x, b.y), f * (a.radius + b.radius)) for f in (1.0, 2.4))
            if (relation in loose) != (relation in tight):
                return None
            if relation not in loose:
                return False
    return sum(map(len, groups)) == len(objects)


@pytest.fixture(scope="module")
def world():
    """100 scenes of each task, from both sides of the split: their specifications, scenes and images."""
    rng = random.Random(11)
    prompts = [caption(rng, tag, held_out=i % 2 == 1) for tag in TAGS for i in range(100)]
    scenes = [scene_for(p.metadata, rng) for p in prompts]
    return [p.metadata for p in prompts], scenes, render(scenes)


@pytest.mark.parametrize("tag", TAGS)
def test_clean_renders_are_right(world, tag):
    wanted, _, images = world
    rows = [i for i, spec in enumerate(wanted) if spec["tag"] == tag]
    verdicts = judge_batch(images[rows], [wanted[i] for i in rows])
    assert len(rows) == 100
    assert sum(v.strict for v in verdicts) >= 99
    assert sum(v.correct for v in verdicts) >= 99


def test_what_is_found_is_what_was_drawn(world):
    wanted, scenes, images = world
    wrong = 0
    for scene, found in zip(scenes, judge_batch(images, wanted), strict=True):
        drawn = sorted((o.shape, o.color) for o in scene)
        wrong += drawn != sorted((str(f.shape), f.color) for f in found.objects)
    assert wrong <= 6


def test_captions_of_other_scenes_are_rejected(world):
    _, scenes, images = world
    rng = random.Random(5)
    asked = [rng.choice(specs(rng.choice(TAGS))) for _ in scenes]
    truth = [satisfied(scene, spec) for scene, spec in zip(scenes, asked, strict=True)]
    verdicts = judge_batch(images, asked)
    assert truth.count(False) > 500
    assert not [a for a, t, v in zip(asked, truth, verdicts, strict=True) if t is False and v.strict]
    assert 10 < truth.count(True) == sum(v.strict for t, v in zip(truth, verdicts, strict=True) if t)


def test_strict_is_a_score_of_one_and_implies_correct(world):
    wanted, _, images = world
    shuffled = random.Random(2).sample(wanted, len(wanted))
    verdicts = judge_batch(images, wanted) + judge_batch(images, shuffled)
    assert all(v.strict == (v.score == 1) for v in verdicts)
    assert all(v.correct for v in verdicts if v.strict)
    assert all(0 <= v.score <= 1 for v in verdicts)
    assert len({v.score for v in verdicts}) > 6


@pytest.mark.parametrize(
    ("scene", "spec", "correct", "strict", "score"),
    [
        ([CIRCLE], SINGLE, True, True, 1),
        ([SQUARE], SINGLE, False, False, 0),
        ([], SINGLE, False, False, 0),
        # Extra objects: GenEval lets them pass, the score counts what was asked for among what is there.
        ([CIRCLE, SQUARE], SINGLE, True, False, 1 / 2),
        ([CIRCLE, SQUARE, TRIANGLE], TWO, True, False, 2 / 3),
        # One of two credits.
        ([CIRCLE], TWO, False, False, 1 / 2),
        ([CIRCLE, TRIANGLE], TWO, False, False, 1 / 2),
        # Counting: too few, one too many (excluded), and right beside another shape.
        (CIRCLES[:2], THREE, False, False, 2 / 3),
        (CIRCLES[:3], THREE, True, True, 1),
        (CIRCLES, THREE, False, False, 3 / 4),
        ([*CIRCLES[:3], thing("square", "blue", 32, 32)], THREE, True, False, 3 / 4),
        # A wrong colour keeps the credit for the shape; a wrong shape has none.
        ([thing("circle", "blue", 14, 32)], RED, False, False, 1 / 2),
        ([thing("square", "red", 14, 32)], RED, False, False, 0),
        # Position: credits for the square, the circle and the relation.
        ([CIRCLE, SQUARE], LEFT, True, True, 1),
        ([thing("circle", "red", 52, 32), thing("square", "blue", 12, 32)], LEFT, False, False, 2 / 3),
        ([thing("circle", "red", 32, 12), thing("square", "blue", 32, 52)], LEFT, False, False, 2 / 3),
        ([CIRCLE], LEFT, False, False, 1 / 3),
        # Colour attribution: swapped colours leave the two credits for the shapes, of four.
        ([CIRCLE, SQUARE], ATTR, True, True, 1),
        ([thing("circle", "blue", 14, 32), thing("square", "red", 50, 32)], ATTR, False, False, 1 / 2),
        ([CIRCLE, thing("square", "red", 50, 32)], ATTR, False, False, 3 / 4),
    ],
)
def test_verdicts_by_hand(scene, spec, correct, strict, score):
    found = verdict(scene, spec)
    assert (found.correct, found.strict) == (correct, strict)
    assert found.score == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_an_object_is_found_where_it_was_drawn(shape, color):
    (found,) = verdict([thing(shape, color, 20.3, 40.7, 11)], SINGLE).objects
    assert (found.shape, found.color) == (shape, color)
    assert found.x == pytest.approx(20.3, abs=0.8)
    # The box of a triangle reaches from 1 above its centre to 0.5 below, in radii.
    assert found.y == pytest.approx(40.7 - (0.25 * 11 if shape == "triangle" else 0), abs=0.8)
    assert found.overlap > 0.9


def blob(kind):
    """An image with one red blob that is no shape of the world."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    if kind == "bar":
        mask = (x.abs() < 20) & (y.abs() < 5)
    elif kind == "cross":
        mask = ((x.abs() < 4) & (y.abs() < 16)) | ((y.abs() < 4) & (x.abs() < 16))
    elif kind == "ring":
        mask = (torch.hypot(x, y) < 16) & (torch.hypot(x, y) > 12)
    elif kind == "corner":
        mask = (x.abs() < 15) & (y.abs() < 15) & ~((x > -6) & (y < 6))
    image = render([[]])[0]
    image[:, mask] = (torch.tensor(COLORS["red"]) / 255)[:, None]
    return image


@pytest.mark.parametrize("kind", ["bar", "cross", "ring", "corner"])
def test_a_blob_is_an_object_but_no_shape(kind):
    specifications = [{"include": [item(shape)]} for shape in SHAPES]
    verdicts = judge_batch(blob(kind).expand(3, -1, -1, -1), specifications)
    assert [o.shape for o in verdicts[0].objects] == [None]
    assert [(v.correct, v.score) for v in verdicts] == [(False, 0)] * 3


def test_a_blob_beside_the_right_object_is_not_strict():
    image = render([[thing("circle", "blue", 12, 12)]])
    image[0, :, 40:46, 10:50] = (torch.tensor(COLORS["red"]) / 255).view(3, 1, 1)
    (found,) = judge_batch(image, [SINGLE])
    assert (found.correct, found.strict, found.score) == (True, False, 0.5)


@pytest.mark.parametrize("kind", ["uniform", "smooth", "grey", "black", "nan"])
def test_noise_shows_nothing_right(kind):
    generator = torch.Generator().manual_seed(0)
    images = {
        "uniform": torch.rand(12, 3, 64, 64, generator=generator),
        "smooth": torch.nn.functional.interpolate(
            torch.rand(12, 3, 6, 6, generator=generator), size=64, mode="bilinear"
        ),
        "grey": torch.full((12, 3, 64, 64), 0.5),
        "black": torch.zeros(12, 3, 64, 64),
        "nan": torch.full((12, 3, 64, 64), torch.nan),
    }[kind]
    asked = [spec for tag in ("single_object", "two_object", "counting") for spec in specs(tag)][:12]
    assert not any(v.strict for v in judge_batch(images, asked))
    if kind in ("uniform", "grey", "black", "nan"):
        assert not any(v.correct for v in judge_batch(images, asked))


def test_small_distortions_do_not_change_the_verdict(world):
    wanted, _, images = world
    rows = slice(0, 600, 6)
    noisy = images[rows] + 0.04 * torch.randn(images[rows].shape, generator=torch.Generator().manual_seed(1))
    verdicts = judge_batch(noisy, wanted[rows])
    assert sum(v.strict for v in verdicts) >= 97


def test_any_float_type_and_slight_overshoot_are_read():
    image = render([[CIRCLE, SQUARE]])
    for variant in (image.double(), image.half(), image * 1.04 - 0.02, image.clone().requires_grad_()):
        assert judge_batch(variant, [ATTR])[0].strict


def test_an_image_per_specification_is_needed():
    with pytest.raises(ValueError, match="zip"):
        judge_batch(render([[CIRCLE]]), [SINGLE, SINGLE])
