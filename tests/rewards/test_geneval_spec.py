"""What a prompt asks for is read alike from every container, or refused with the entry that cannot be read."""

import json

import pytest

from diffalign.rewards import get_reward
from diffalign.rewards.geneval import COLORS
from diffalign.rewards.geneval_spec import read_spec
from diffalign.rewards.ocr import target_of
from diffalign.rewards.vlm_judge import _questions
from diffalign.rollout.scoring import RewardWarning, score
from diffalign.shapes import Object, render
from diffalign.structures import Prompt

RED = {"class": "cat", "count": 1, "color": "red"}
BESIDE = {"class": "dog", "count": 2, "position": ["left of", 0]}
SPEC = {"tag": "position", "include": [RED, BESIDE], "exclude": [{"class": "cat", "count": 2}], "seen": 7}


def read(metadata):
    return read_spec(metadata, {"cat", "dog"}, dict.fromkeys(COLORS), "the detector")


WRITTEN = {
    "plain": SPEC,
    "nulls": {
        **SPEC,
        "include": [{**RED, "position": None}, {**BESIDE, "color": None}],
        "exclude": [{"class": "cat", "count": 2, "color": None, "position": None}],
        "other": None,
    },
    "floats": {**SPEC, "include": [{**RED, "count": 1.0}, {**BESIDE, "count": 2.0, "position": ["left of", 0.0]}]},
    "texts": {**SPEC, "include": [RED, {**BESIDE, "position": ("left of", "0")}]},
    "json": {**SPEC, "include": json.dumps([RED, {**BESIDE, "color": None}])},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_containers_make_of_a_specification_is_undone(kind):
    found = read(WRITTEN[kind])
    assert found["include"] == [RED, {**BESIDE, "position": ("left of", 0)}]
    assert found["exclude"] == SPEC["exclude"]
    assert found["seen"] == 7


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": "cat"}, "include is text but not JSON: cat"),
        ({"include": {"class": "cat"}}, r"include is \{'class': 'cat'\}; write a list of objects"),
        ({"include": ["cat"]}, r"include\[0\] is 'cat'; write"),
        ({"include": [{"class": "cat"}]}, r"include\[0\]\.count is None; write a whole number of at least 1"),
        ({"include": [{**RED, "count": 0}]}, r"include\[0\]\.count is 0; write"),
        ({"include": [{**RED, "count": -1}]}, r"include\[0\]\.count is -1; write"),
        ({"include": [{**RED, "count": 1.5}]}, r"include\[0\]\.count is 1\.5; write"),
        ({"include": [{**RED, "count": True}]}, r"include\[0\]\.count is True; write"),
        ({"include": [{**RED, "count": "two"}]}, r"include\[0\]\.count is 'two'; write"),
        ({"include": [{**RED, "colour": "red"}]}, r"include\[0\] has the key colour; it can have class, count, color"),
        ({"include": [{**RED, "color": "mauve"}]}, r"knows no color 'mauve'; it knows red, orange"),
        ({"include": [{"count": 1}]}, "knows no None; it knows cat, dog"),
        ({"include": [RED, {**BESIDE, "position": "left of"}]}, r"include\[1\]\.position is 'left of'; write"),
        ({"include": [RED, {**BESIDE, "position": ["beside", 0]}]}, r"include\[1\]\.position is .*one of left of"),
        ({"include": [RED, {**BESIDE, "position": ["left of", 1]}]}, r"include\[1\]\.position refers to entry 1"),
        ({"include": [RED, {**BESIDE, "position": ["left of", -1]}]}, r"include\[1\]\.position\[1\] is -1; write"),
        ({"include": [RED], "exclude": [{"class": "cat"}]}, r"exclude\[0\]\.count is None"),
        ({"include": [RED], "exclude": {"class": "cat"}}, r"exclude is \{'class': 'cat'\}"),
        ({"include": [{**RED, "class": "c" * 10**6}]}, "knows no 'ccc"),
        ({"include": [{**RED, "color": ["red"]}]}, "knows no color"),
        ({"include": [{**RED, "class": ["cat"]}]}, "knows no"),
    ],
)
def test_an_entry_that_cannot_be_read_is_named(metadata, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(metadata)
    assert len(str(caught.value)) < 1600


CIRCLE = {"class": "circle", "count": 1, "color": "red"}


@pytest.mark.parametrize("name", ["shapes", "shapes_strict", "shapes_correct"])
@pytest.mark.parametrize("extra", [{}, {"position": None}, {"count": 1.0}])
def test_the_shapes_rewards_read_it_from_every_container(name, extra):
    images = render([[Object("circle", "red", 20, 20, 10)]])
    assert get_reward(name)(images, ["p"], [{"include": [{**CIRCLE, **extra}], "exclude": None}]).tolist() == [1.0]


@pytest.mark.parametrize(
    "wrong",
    [{"class": "star"}, {"colour": "red"}, {"color": "pink"}, {"count": "one"}],
    ids=["class", "key", "color", "count"],
)
@pytest.mark.parametrize("name", ["shapes", "shapes_strict", "shapes_correct"])
def test_one_bad_specification_costs_its_own_sample_and_is_said(name, wrong):
    images = render([[Object("circle", "red", 20, 20, 10)]] * 2)
    prompts = [Prompt("good", {"include": [CIRCLE]}), Prompt("bad", {"include": [{**CIRCLE, **wrong}]})]
    with pytest.warns(RewardWarning, match="cannot read the metadata of 'bad'"):
        found = score({name: get_reward(name)}, images, prompts)[name]
    assert found.isnan().tolist() == [False, True]


def test_metadata_of_other_kinds_are_not_taken_for_what_they_are_not():
    assert target_of("p", {"text": 7}) == "7"
    assert _questions({"questions": ["Is it red?"]}) == ["Is it red?"]
    assert _questions({"questions": None}) == []
    for wrong in ("Is it red?", 7, {"a": 1}, [1]):
        with pytest.raises(ValueError, match="write a list of texts"):
            _questions({"questions": wrong})
