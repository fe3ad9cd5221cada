"""Judges that nothing trains on: the panel, what it refuses, what it says, and the alarm that reads it."""

import pytest

from diffalign import FlowGRPOTrainer
from diffalign.config.held_out import PANEL, held_out_table
from diffalign.config.sections import RewardConfig
from diffalign.evaluation.hacking import panel_alarm
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.inputs import Inputs, held_out_sentence, with_held_out
from diffalign.trainers.registry import algorithm_names, config_class
from tests.conftest import ROOT

JUDGES = ROOT / "assets/judges"
PICKSCORE = {"path": str(JUDGES / "pickscore"), "tokenizer": str(JUDGES / "pickscore")}


def test_the_panel_is_the_usual_five_without_those_trained_on():
    assert list(held_out_table({"panel": 1.0}, {"shapes": 1.0})) == list(PANEL)
    for trained in ({"pickscore": 1.0}, {"look": RewardConfig(reward="pickscore")}):
        assert list(held_out_table({"panel": 1.0}, trained)) == [name for name in PANEL if name != "pickscore"]
    own = RewardConfig(options={"path": "mine"})
    assert held_out_table({"panel": 1.0, "clipscore": own}, {})["clipscore"] is own


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [
        ({"pickscore": 1.0}, {"pickscore": 1.0}),
        ({"panel": 1.0, "pickscore": 1.0}, {"look": RewardConfig(reward="pickscore")}),
        ({"mine": RewardConfig(reward="pickscore")}, {"pickscore": 0.5}),
        ({"panel": 1.0}, dict.fromkeys(PANEL, 1.0)),
    ],
)
def test_a_judge_that_is_trained_on_is_refused(held_out, trained):
    with pytest.raises(ValueError, match="the run trains on"):
        held_out_table(held_out, trained)


@pytest.mark.parametrize("name", algorithm_names())
def test_every_trainer_has_the_panel(name):
    assert "held_out" in {field.name for field in config_class(name).__dataclass_fields__.values()}


def test_a_judge_with_the_weights_of_a_trained_reward_is_refused(small):
    from diffalign.rewards import get_reward

    mine = RewardConfig(reward="clipscore", options=PICKSCORE)
    config = small(rewards={"pickscore": RewardConfig(options=PICKSCORE)}, held_out={"mine": mine})
    inputs = Inputs(config, rewards={"pickscore": get_reward("pickscore", **PICKSCORE)})
    with pytest.raises(ValueError, match="mine has the weights of pickscore"):
        with_held_out(inputs)


def test_the_sentence_says_what_the_panel_is_and_costs(small):
    config = small(rewards={"pickscore": 1.0}, held_out={"panel": 1.0})
    said = held_out_sentence(with_held_out(Inputs(config, rewards={})))
    assert said.startswith("hpsv2.1, image_reward, aesthetic, clipscore (without pickscore, trained on), never trained")
    assert "GB" in said


def test_the_alarm_needs_rewards_that_rise_and_most_judges_that_fall():
    base = {"r": 1.0, "a": 1.0, "b": 1.0, "c": 1.0}
    judges = ("a", "b", "c")
    assert "2 of 3 held-out judges fell" in panel_alarm(base, {"r": 2.0, "a": 0.5, "b": 0.5, "c": 2.0}, ["r"], judges)
    assert not panel_alarm(base, {"r": 2.0, "a": 0.5, "b": 2.0, "c": 2.0}, ["r"], judges)
    assert not panel_alarm(base, {"r": 0.5, "a": 0.5, "b": 0.5, "c": 0.5}, ["r"], judges)
    assert not panel_alarm(base, {"a": 0.5, "b": 0.5, "c": 0.5}, ["r"], judges)  # nothing trained is known
    assert not panel_alarm({**base, "a": None}, {"r": 2.0, "a": 0.5, "b": float("nan"), "c": 2.0}, ["r"], judges)


def test_a_run_evaluates_the_panel_and_draws_it(small, eval_prompts, train_prompts, capsys):
    options = {
        "pickscore": PICKSCORE,
        "hpsv2.1": {"path": str(JUDGES / "hps")},
        "aesthetic": {"path": str(JUDGES / "aesthetic/aesthetic-model.pth"), "clip": PICKSCORE["path"]},
    }
    judges = {name: RewardConfig(options=own) for name, own in options.items()}
    args = small(eval_prompts=eval_prompts, eval_images_per_prompt=1, max_train_steps=1, held_out=judges)
    FlowGRPOTrainer(args=args, train_dataset=train_prompts).train()
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "eval/alarm" in row]
    assert len(rows) == 2
    assert all(f"eval/{name}" in row for row in rows for name in [*options, "shapes"])
    assert (args.output_dir / "hacking.png").is_file()
    assert "held out    pickscore, hpsv2.1" in capsys.readouterr().out
