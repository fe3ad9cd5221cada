"""The collapse alarm in runs: every online trainer raises it, and so does a learning rate that is too high."""

from dataclasses import replace

import pytest

from diffalign import LoraConfig
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.collapse import COLLAPSE
from diffalign.rewards.base import FunctionReward
from diffalign.rollout.collapse_config import CollapseConfig
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PROMPTS
from tests.reliability.trainers import TRAINERS, short
from tests.trainers.made_forward_rl import config, trainer_of

ONLINE = [name for name in TRAINERS if name != "diffusion_dpo"]
QUICK = CollapseConfig(window=2, significance=2.0)


def falling(reward_of_call):
    """A reward, differentiable and different for any two images, whose level is a function of the call."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        return 1e-3 * images.mean((1, 2, 3)) + reward_of_call(len(calls))

    return FunctionReward("level", reward, differentiable=True)


def small(name, folder, **changes):
    few = {"updates_per_rollout": 1, "rollout_batch_size": 4, "train_batch_size": 4}
    if name == "refl":
        few = {"rollout_batch_size": 2, "train_batch_size": 2}
    few |= {"max_train_steps": 7, "rewards": {}, "collapse": QUICK, "checkpointing_steps": 0}
    return short(name, folder, **(few | changes))


@pytest.mark.parametrize("name", ONLINE)
def test_every_online_trainer_raises_the_alarm_once_and_reports_it(name, tmp_path, recwarn):
    reward = falling(lambda call: 0.0 if call > 5 else 1.0)
    TRAINERS[name].trainer(args=small(name, tmp_path / "run"), reward_funcs=reward).train()
    alarms = [str(w.message) for w in recwarn if "the training collapses" in str(w.message)]
    assert len(alarms) == 1
    assert "learning_rate" in alarms[0]
    rows = MetricsLog.read(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if row.get(COLLAPSE)][-1] == 7
    assert COLLAPSE not in rows[0]
    assert "**Alarm.**" in (tmp_path / "run/README.md").read_text()


def test_an_offline_run_has_no_alarm_to_set(tmp_path):
    with pytest.raises(ValueError, match="collapse"):
        short("diffusion_dpo", tmp_path, collapse=QUICK).validate()


def test_a_learning_rate_that_is_too_high_raises_the_alarm(tmp_path, recwarn):
    """A real collapse: the images of the embedded world turn into noise."""
    prompts = load_prompts(PROMPTS / "shapes_train.jsonl")[::21]
    args = config(
        tmp_path, "nft", learning_rate=0.02, max_train_steps=9, num_groups=8, rollout_batch_size=16,
        train_batch_size=16, num_times=1, reference_weight=0.1, lora=LoraConfig(rank=4),
        collapse=CollapseConfig(window=3, significance=3.0),
    )  # fmt: skip
    trainer_of(args, "shapes", train_dataset=prompts).train()
    alarms = [str(w.message) for w in recwarn if "the training collapses" in str(w.message)]
    assert len(alarms) == 1
    assert "the mean reward of 3 iterations fell from" in alarms[0]
    assert "reference_weight: 0.1" in alarms[0]


def test_a_resumed_run_knows_the_rows_from_before(tmp_path, monkeypatch):
    kind, folder = TRAINERS["forward_rl"].trainer, tmp_path / "run"
    args = small("forward_rl", folder, max_train_steps=5)
    trainer = kind(args=args, reward_funcs=falling(lambda call: 1.0))
    sample = trainer.algorithm.sample
    monkeypatch.setattr(trainer.algorithm, "sample", lambda i: sample(i) if i < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    again = replace(args, resume_from_checkpoint="latest")
    kind(args=again, reward_funcs=falling(lambda call: 0.0)).train()
    rows = MetricsLog.read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get(COLLAPSE)] == [5]
    assert "**Alarm.**" in (folder / "README.md").read_text()
