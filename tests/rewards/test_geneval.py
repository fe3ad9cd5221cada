"""GenEval's checks: against a transcription of the published rule, and with a real detector of small random weights."""

import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoTokenizer,
    CLIPModel,
)

from diffalign.rewards import geneval as module
from diffalign.rewards.geneval import (
    BACKGROUND,
    COLORS,
    Found,
    _load,
    class_names,
    colors_by_clip,
    correct,
    detect,
    geneval,
    graded,
    relations,
)
from diffalign.rewards.support import weights
from diffalign.rewards.support.preprocess import centre_round
from diffalign.rewards.support.weights import Weights


def thing(left, top, right, bottom, color=None):
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[int(top) : int(bottom), int(left) : int(right)] = True
    found = Found((left, top, right, bottom), mask)
    COLOR_OF[id(found)] = (found, color)
    return found


COLOR_OF = {}


def colors_of(found, name):
    return [COLOR_OF[id(one)][1] for one in found]


def published_relations(a, b):
    """With arrays, as the authors compute it."""
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(np.diff(boxes, axis=1))[:, 0]
    offset = centres[0] - centres[1]
    revised = np.maximum(np.abs(offset) - 0.1 * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def published_verdict(objects, spec):
    """True by the published rule, clause by clause."""
    good, matched = True, []
    for clause in spec.get("include", []):
        things = list(objects.get(clause["class"], []))[: clause["count"]]
        fits = len(things) == clause["count"]
        if fits and clause.get("color"):
            fits = sum(c == clause["color"] for c in colors_of(things, clause["class"])) == clause["count"]
        if fits and clause.get("position"):
            relation, index = clause["position"]
            other = matched[index]
            fits = other is not None and all(relation in published_relations(a, b) for a in things for b in other)
        matched.append(things if fits else None)
        good = good and fits
    for clause in spec.get("exclude", []):
        good = good and not len(objects.get(clause["class"], [])) >= clause["count"]
    return good


def published_reward(objects, spec):
    """What the reward server of Flow-GRPO averages, clause by clause (its names, in its order)."""
    rewards, matched_groups = [], []
    for req in spec.get("include", []):
        found = objects.get(req["class"], [])
        rewards.append(1 - abs(req["count"] - len(found)) / req["count"])
        matched = len(found) == req["count"]
        if not matched:
            rewards += [0.0] * bool({"color", "position"} & set(req))
        else:
            if "color" in req:
                right = sum(color == req["color"] for color in colors_of(found, req["class"]))
                rewards.append(1 - abs(req["count"] - right) / req["count"])
                matched = right == req["count"]
            if "position" in req and matched:
                relation, index = req["position"]
                if matched_groups[index] is None:
                    matched = False
                    rewards.append(0.0)
                else:
                    pairs = product(found, matched_groups[index])
                    wrong = [pair for pair in pairs if relation not in published_relations(*pair)]
                    if wrong:
                        matched = False
                        rewards.append(0.0)  # it stops at the first
                    rewards.append(1.0)  # whatever came before
        matched_groups.append(found if matched else None)
    return sum(rewards) / len(rewards)


def scenes(count):
    rng = random.Random(0)
    for _ in range(count):
        objects = {}
        for name in ("cat", "dog"):
            for _ in range(rng.randrange(4)):
                left, top = rng.uniform(0, 60), rng.uniform(0, 60)
                size = rng.uniform(5, 40), rng.uniform(5, 40)
                color = rng.choice(("red", "blue"))
                objects.setdefault(name, []).append(thing(left, top, left + size[0], top + size[1], color))
        yield rng, objects


def test_relations_are_the_published_ones():
    seen = set()
    for _, objects in scenes(400):
        for a in objects.get("cat", []):
            for b in objects.get("dog", []):
                assert relations(a, b) == published_relations(a, b)
                seen |= {frozenset(relations(a, b))}
    assert len(seen) == 9, "none, one, or two at a right angle"


def test_verdicts_are_the_published_ones():
    verdicts, partials = [], []
    for rng, objects in scenes(600):
        first = {"class": "cat", "count": rng.randrange(1, 3)}
        second = {"class": "dog", "count": 1}
        if rng.random() < 0.5:
            second["color"] = rng.choice(("red", "blue"))
        if rng.random() < 0.5:
            second["position"] = [rng.choice(("left of", "right of", "above", "below")), 0]
        spec = {"include": [first, second]}
        if rng.random() < 0.5:
            spec["exclude"] = [{"class": "cat", "count": first["count"] + 1}]
        assert correct(objects, colors_of, spec) == published_verdict(objects, spec)
        verdicts.append(correct(objects, colors_of, spec))
        partial = graded(objects, colors_of, spec)
        assert partial == pytest.approx(published_reward(objects, spec))
        partials.append(partial)
    assert 0.05 < np.mean(verdicts) < 0.5
    assert len(set(partials)) > 10
    assert min(partials) < 0


def test_partial_credit():
    cats = {"cat": [thing(0, 0, 10, 10, "red"), thing(50, 0, 60, 10, "blue")], "dog": [thing(0, 50, 10, 60, "red")]}
    for include, expected in (
        ([{"class": "cat", "count": 4}], 1 / 2),
        ([{"class": "cat", "count": 1}], 0.0),
        ([{"class": "bird", "count": 2}], 0.0),
        ([{"class": "cat", "count": 2, "color": "red"}], (1 + 1 / 2) / 2),
        ([{"class": "cat", "count": 1, "color": "red"}], 0.0),
        ([{"class": "cat", "count": 3, "color": "red", "position": ["above", 0]}], (2 / 3 + 0) / 2),
        ([{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "position": ["above", 0]}], 1.0),
        ([{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "position": ["left of", 0]}], (1 + 1 + 0 + 1) / 4),
        ([{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["below", 0]}], (0 + 1 + 0) / 3),
    ):
        assert graded(cats, colors_of, {"include": include}) == pytest.approx(expected)


# What GenEval asks for, in COCO's order, and where detectors trained on COCO say otherwise.
NAMES = (Path(__file__).parent / "published/geneval_names.txt").read_text().splitlines()[1:]
COCO = {64: "mouse", 65: "remote", 66: "keyboard"}
VOC = {3: "motorbike", 4: "aeroplane", 57: "sofa", 58: "pottedplant", 60: "diningtable", 62: "tvmonitor"}


@pytest.mark.parametrize("other", [COCO, {**COCO, **VOC}], ids=["coco", "voc"])
def test_a_detectors_classes_are_the_ones_that_geneval_asks_for(other):
    labels = {i: other.get(i, name) for i, name in enumerate(NAMES)}
    found = class_names(SimpleNamespace(config=SimpleNamespace(id2label=labels)))
    assert list(found.values()) == NAMES


def test_colours_are_told_from_the_object_on_grey(clip_folder, monkeypatch):
    """The cut-out that CLIP sees, and that each object gets the colour of its own."""
    picture = Image.new("RGB", (100, 100), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 20, 29, 39), fill=(255, 0, 0))
    draw.rectangle((50, 50, 89, 89), fill=(0, 0, 255))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    seen = []
    directions = torch.eye(16)

    def embed(model, images, quantize, crop):
        assert crop is centre_round
        seen.append(images)
        return directions[COLORS.index("red" if images[0, 0].mean() > images[0, 2].mean() else "blue")][None]

    def read(model, tokenizer, lines):
        assert lines[:3] == ["a photo of a red cube", "a photo of a red-colored cube", "a photo of a red object"]
        return torch.stack([directions[next(i for i, c in enumerate(COLORS) if c in line)] for line in lines])

    monkeypatch.setattr(module, "image_embeddings", embed)
    monkeypatch.setattr(module, "text_embeddings", read)
    half = thing(10, 20, 30, 40)
    half.mask[30:] = False
    found = [half, thing(50, 50, 90, 90)]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    assert colors_by_clip(model, tokenizer, image, found, "cube") == ["red", "blue"]
    assert seen[0].shape == (1, 3, 20, 20)
    assert (seen[0][0, :, 12:] == BACKGROUND).all()
    assert (seen[0][0, 0, :10] == 1).all()


def test_a_real_detector_is_asked_and_its_objects_are_sorted(detector_folder, clip_folder):
    weights._LOADED.clear()
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    detector, processor, *_ = _load(Weights(str(detector_folder)), str(clip_folder))
    with torch.no_grad():
        objects = detect(detector, processor, images[0], threshold=0.0)
    assert set(objects) <= {"cat", "computer mouse", "circle"}
    for found in objects.values():
        for one in found:
            assert one.mask.shape == (40, 56)
            left, top, right, bottom = one.box
            assert one.mask[top:bottom, left:right].sum() == one.mask.sum()
            assert one.mask[top:bottom, left].any()
            assert one.mask[bottom - 1, left:right].any()
    specs = [{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}] * 2
    for verdict in ("correct", "graded"):
        values = geneval("g", verdict, str(detector_folder), str(clip_folder))(images, ["x"] * 2, specs)
        assert values.shape == (2,)
        assert (values <= 1).all()


def test_what_cannot_be_checked_is_refused(detector_folder, clip_folder):
    with pytest.raises(ValueError, match="verdict must be one of correct, graded, got 'strict'"):
        geneval("g", "strict", str(detector_folder), str(clip_folder))
    with pytest.raises(ValueError, match=r"'g' needs the objects of 'a cat': add metadata in GenEval's format"):
        geneval("g", "correct", str(detector_folder), str(clip_folder))(torch.rand(1, 3, 8, 8), ["a cat"], [{}])
    spec = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "unicorn", "count": 1}]}
    with pytest.raises(ValueError, match=r"knows no 'unicorn'; it knows cat, circle, computer mouse"):
        geneval("g", "correct", str(detector_folder), str(clip_folder))(torch.rand(1, 3, 8, 8), ["a cat"], [spec])
