import random
import re
from itertools import pairwise

import pytest

from diffalign.shapes import TAGS, caption, disjoint_prompt_set, prompt_set
from diffalign.shapes.captions import OPENINGS, combination, is_novel, item, phrase, specs, vocabulary
from diffalign.shapes.scene import HELD_OUT_COLORS, HELD_OUT_DIRECTIONS, HELD_OUT_PAIRS, HELD_OUT_RELATIONS

# Written out, so that the split is checked on the words themselves.
HELD_OUT_WORDS = {"red triangle", "green circle", "purple square"}
HELD_OUT_PHRASES = {f"a {a} {relation} a {b}" for a, relation, b in HELD_OUT_RELATIONS}
COMBINED = ("colors", "position", "color_attr")


def names_held_out(text):
    colors = set(re.findall("red|green|blue|yellow|purple|cyan", text))
    return (
        any(words in text for words in HELD_OUT_WORDS | HELD_OUT_PHRASES)
        or colors in ({"red", "cyan"}, {"green", "purple"}, {"blue", "yellow"})
        or any(relation in text and colors == {color} for color, relation in HELD_OUT_DIRECTIONS)
    )


@pytest.fixture(scope="module")
def train():
    rng = random.Random(0)
    return [caption(rng, tag) for tag in TAGS for _ in range(400)]


@pytest.fixture(scope="module")
def held_out():
    return prompt_set(70, held_out=True, seed=3)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"include": [item("circle")]}, "a circle"),
        ({"include": [item("circle"), item("square")]}, "a circle and a square"),
        ({"include": [item("triangle", 3)]}, "three triangles"),
        ({"include": [item("square", color="cyan")]}, "a cyan square"),
        ({"include": [item("square"), item("circle", position=["left of", 0])]}, "a circle left of a square"),
        ({"include": [item("circle", color="red"), item("square", color="blue")]}, "a red circle and a blue square"),
    ],
)
def test_wording_by_hand(spec, text):
    assert phrase(spec) == text


def test_every_specification_has_its_own_wording_in_its_task():
    for tag, count in zip(TAGS, (3, 6, 9, 18, 204, 180), strict=True):
        assert len({phrase(spec) for spec in specs(tag)}) == len(specs(tag)) == count
        assert all(spec["tag"] == tag for spec in specs(tag))


def test_a_count_excludes_one_more():
    for spec in specs("counting"):
        (wanted,), (unwanted,) = spec["include"], spec["exclude"]
        assert unwanted == {"class": wanted["class"], "count": wanted["count"] + 1}


def test_training_captions_name_nothing_held_out(train):
    assert not [p.text for p in train if names_held_out(p.text)]


def test_held_out_captions_are_on_the_other_side(train, held_out):
    assert all(names_held_out(p.text) and is_novel(p.metadata) for p in held_out if p.metadata["tag"] in COMBINED)
    # Their number is small enough for the training draws to have met nearly all wordings of their own side.
    assert not {p.text for p in train} & {p.text for p in held_out}


def test_the_held_out_set_is_large_balanced_distinct_and_repeatable(held_out):
    assert len(held_out) == len({p.text for p in held_out}) == 420
    assert [sum(p.metadata["tag"] == tag for p in held_out) for tag in TAGS] == [70] * 6
    assert held_out == prompt_set(70, held_out=True, seed=3)
    assert held_out != prompt_set(70, held_out=True, seed=4)


def test_a_second_held_out_set_shares_no_caption_with_the_first(held_out):
    second = disjoint_prompt_set(70, seed=3, others=held_out)
    assert [sum(p.metadata["tag"] == tag for p in second) for tag in TAGS] == [70] * 6
    assert len({p.text for p in (*held_out, *second)}) == 840
    assert all(names_held_out(p.text) and is_novel(p.metadata) for p in second if p.metadata["tag"] in COMBINED)
    first, other = (
        {combination(p.metadata) for p in prompts if p.metadata["tag"] in ("position", "color_attr")}
        for prompts in (held_out, second)
    )
    assert not first & other
    assert second == disjoint_prompt_set(70, seed=3, others=held_out)
    with pytest.raises(ValueError, match="two_object has 74 captions"):
        disjoint_prompt_set(75, seed=3, others=held_out)


@pytest.mark.parametrize("tag", ["two_object", "color_attr"])
def test_a_combination_has_no_order(tag):
    first = next(s for s in specs(tag))
    swapped = {**first, "include": first["include"][::-1]}
    assert combination(first) == combination(swapped)
    assert combination(first) not in {combination(s) for s in specs(tag) if s not in (first, swapped)}


def test_a_relation_has_an_order():
    assert len({combination(spec) for spec in specs("position")}) == len(specs("position"))


def test_all_held_out_combinations_are_asked_for(held_out):
    text = " / ".join(p.text for p in held_out)
    assert all(words in text for words in HELD_OUT_WORDS)
    asked = [p.metadata["include"] for p in held_out]
    assert {frozenset(i["color"] for i in items if "color" in i) for items in asked} >= HELD_OUT_COLORS
    relations = [items for items in asked if "position" in items[-1]]
    named = {(i["color"], items[1]["position"][0]) for items in relations for i in items if "color" in i}
    assert named == HELD_OUT_DIRECTIONS
    assert {" ".join(pair) for pair in HELD_OUT_PAIRS} == HELD_OUT_WORDS


def test_a_caption_is_an_opening_and_the_plain_wording(train):
    for prompt in train:
        plain = phrase(prompt.metadata)
        assert prompt.text.endswith(plain)
        assert prompt.text.removesuffix(plain) in OPENINGS
    plain_share = sum(p.text == phrase(p.metadata) for p in train) / len(train)
    assert 0.25 < plain_share < 0.5


def test_plain_chooses_the_share_without_opening():
    rng = random.Random(0)
    assert all(p.text == phrase(p.metadata) for p in (caption(rng, plain=1.0) for _ in range(50)))
    assert all(p.text != phrase(p.metadata) for p in (caption(rng, plain=0.0) for _ in range(50)))


def test_more_captions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="single_object"):
        prompt_set(80, held_out=True, seed=0)


def test_a_task_with_fewer_captions_may_repeat_them():
    prompts = prompt_set(80, held_out=False, seed=0, repeat=True)
    by_tag = {tag: [p.text for p in prompts if p.metadata["tag"] == tag] for tag in TAGS}
    assert all(len(texts) == 80 for texts in by_tag.values())
    assert len(set(by_tag["single_object"])) == 75
    assert len(set(by_tag["position"])) == 80


def test_the_vocabulary_holds_every_word_once(train, held_out):
    words = vocabulary()
    assert all(a < b for a, b in pairwise(words))
    assert {word for p in (*train, *held_out) for word in p.text.split()} <= set(words)
