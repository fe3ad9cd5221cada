"""A rollout buffer on disk is a preference data set."""

import json
import math

import pytest
import torch

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.rollouts import Pairing, pick_pairs, rollout_pairs
from diffalign.diffusion.plan import Plan, Row
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.structures import Prompt

GROUPS = [1, 0, 1, 0, 1, 0]
SCORES = [0.5, 0.2, 0.9, 0.8, 0.1, 0.2]


def line(number, **rewards):
    return {
        "file_name": f"images/{number}.png",
        "prompt": f"prompt {GROUPS[number]}",
        "group": GROUPS[number],
        "sample": number,
        "rewards": rewards,
        "metadata": {"tag": GROUPS[number]},
    }


def test_the_best_and_the_worst_of_a_group_are_a_pair():
    assert pick_pairs(GROUPS, SCORES, Pairing()) == [(3, 5), (2, 4)], "of equal ones, the last is the worst"


def test_all_two_images_of_a_group_whose_scores_differ_are_pairs():
    assert pick_pairs(GROUPS, SCORES, Pairing(rule="all")) == [(3, 1), (3, 5), (2, 0), (2, 4), (0, 4)]
    assert pick_pairs(GROUPS, SCORES, Pairing(rule="all", min_gap=0.45)) == [(3, 1), (3, 5), (2, 4)]


def test_equal_scores_groups_of_one_and_images_without_a_score_give_no_pair():
    assert pick_pairs([0, 0], [0.3, 0.3], Pairing()) == []
    assert pick_pairs([0, 1], [0.3, 0.5], Pairing()) == []
    assert pick_pairs([0, 0, 0], [0.3, None, math.nan], Pairing(rule="all")) == []
    assert pick_pairs([0, 0, 0], [0.3, math.nan, 0.4], Pairing()) == [(2, 0)]


def test_lines_become_rows_with_the_better_image_first():
    lines = [line(number, a=score, b=-score) for number, score in enumerate(SCORES)]
    rows = rollout_pairs(lines, Pairing(rewards={"a": 1.0}))
    assert [(str(row["image_0"]), str(row["image_1"])) for row in rows] == [
        ("images/3.png", "images/5.png"),
        ("images/2.png", "images/4.png"),
    ]
    assert rows[0]["label"] == 1
    assert (rows[1]["prompt"], rows[1]["metadata"]) == ("prompt 1", {"tag": 1})
    weighted = rollout_pairs(lines, Pairing(rewards={"a": 1.0, "b": 3.0}))
    assert [str(row["image_0"]) for row in weighted] == ["images/1.png", "images/4.png"]


def test_soft_labels_are_the_sigmoid_of_the_scaled_gap():
    rows = rollout_pairs([line(i, a=s) for i, s in enumerate(SCORES)], Pairing(rule="all", scale=4.0))
    gaps = [0.6, 0.6, 0.4, 0.8, 0.4]
    assert [row["label"] for row in rows] == pytest.approx([1 / (1 + math.exp(-4 * gap)) for gap in gaps])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, r"here has the rewards a, b: name those to use in rollouts.rewards"),
        ({"c": 1.0}, "here has no reward c; it has a, b"),
    ],
)
def test_ambiguous_rewards_are_an_error(rewards, message):
    with pytest.raises(ValueError, match=message):
        rollout_pairs([line(0, a=1.0, b=2.0)], Pairing(rewards=rewards), "here")


@pytest.mark.parametrize(
    ("field", "message"), [({"rule": "best"}, "unknown rule 'best'"), ({"min_gap": -1}, "min_gap")]
)
def test_impossible_pairings_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        Pairing(**field)


@pytest.fixture
def buffer(tmp_path):
    """As a run writes it: two groups of three samples."""
    plan = Plan((Row("flow_sde", 0.7, True), Row("ode", 0.0, False)))
    group, sample = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    prompts = [Prompt("a red circle", {"tag": "colors"}), Prompt("two squares")]
    made = RolloutBuffer.allocate(plan, group, sample, prompts, (1, 2, 2))
    made.x.zero_()
    made.set_rewards({"shapes": torch.tensor([0.5, 1.0, 0.0, torch.nan, 0.25, 0.75])})
    shades = torch.arange(6).reshape(6, 1, 1, 1).expand(6, 3, 16, 16) / 10
    made.save(tmp_path / "rollout", shades, model="m", seed=3)
    return tmp_path / "rollout"


def test_a_saved_rollout_buffer_is_read(buffer):
    data = load_pairs(buffer)
    assert [data[i].prompt for i in range(2)] == [Prompt("a red circle", {"tag": "colors"}), Prompt("two squares")]
    shades = [[image.getpixel((0, 0))[0] for image in data.load(i)[1]] for i in range(2)]
    assert shades == [[26, 51], [128, 102]], "samples 1 and 2; then 2 and 1, the first having no score"
    assert data[0].winner.name == str(buffer / "images/00000-001.png")
    every = load_pairs(buffer, settings=PreferenceDataConfig(rollouts=Pairing(rule="all", min_gap=0.5)))
    assert [every[i].key for i in range(len(every))] == [f"{buffer}, row 0 (group 0, samples 1 and 2)"]


def test_a_line_that_was_cut_is_named(buffer):
    path = buffer / "metadata.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 6: bad JSON"):
        load_pairs(buffer)
    assert json.loads(path.read_text().splitlines()[0])["group"] == 0
