"""Options of a run that configure its rewards and the size of its images."""

import json
import math

import pytest
import torch

from diffalign.rewards.config import RewardConfig
from diffalign.trainers.flow_grpo.algorithm import FlowGRPOTrainer
from diffalign.trainers.inputs import check_groups, evaluation_rewards
from tests.phases import collect


class Ranks:
    """The place of an image in its group, by brightness: needs whole groups. Brightness itself is an extra."""

    name, differentiable, needs_groups, range = "ranks", False, True, (0.0, math.inf)

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts, metadata, groups):
        self.seen.append(groups.tolist())
        light = images.mean((1, 2, 3))
        ranks = [float((light[groups == g] < x).sum()) for x, g in zip(light, groups, strict=True)]
        return torch.tensor(ranks), {"light": light}


def test_a_group_reward_sees_whole_groups_whatever_the_micro_batch(small, train_prompts):
    found = []
    for size in (8, 3):
        ranks = Ranks()
        args = small(rollout_batch_size=size, num_groups=2, group_size=4)
        trainer = FlowGRPOTrainer(args=args, reward_funcs=[ranks, "brightness"], train_dataset=train_prompts[:2])
        batch = collect(trainer)
        metrics = batch.metrics
        assert ranks.seen == [[0, 0, 0, 0, 1, 1, 1, 1]]
        assert metrics["reward/ranks"] == 1.5
        assert metrics["reward/ranks/light"] == pytest.approx(metrics["reward/brightness"], abs=0.1)
        found.append(batch.buffer.advantage[batch.buffer.leaves])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert list(evaluation_rewards((), trainer.inputs.rewards)) == ["brightness"], "a rank compares no models"


def test_groups_may_not_be_split_over_processes():
    with pytest.raises(ValueError, match="ranks judge whole groups: make num_groups a multiple of the 2 processes"):
        check_groups({"ranks": Ranks()}, num_groups=3, processes=2)
    check_groups({"ranks": Ranks()}, num_groups=4, processes=2)


def test_rewards_with_options_and_code_from_a_configuration(small, train_prompts, tmp_path):
    (tmp_path / "mine.py").write_text("def dark(images, prompts, metadata):\n    return -images.mean((1, 2, 3))\n")
    rewards = {"dark": RewardConfig(reward=f"{tmp_path}/mine.py:dark", weight=2.0), "sharpness": 0.5}
    with pytest.raises(ValueError, match="set allow_reward_code if you trust it"):
        FlowGRPOTrainer(args=small(rewards=rewards), train_dataset=train_prompts)
    args = small(rewards=rewards, allow_reward_code=True, eval_rewards=("dark",), max_train_steps=1)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts)
    assert trainer.algorithm.collector.weights == {"dark": 2.0, "sharpness": 0.5}
    trainer.train()
    lines = (args.output_dir / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, lines) if "reward/mean" in row)
    assert row["reward/mean"] == pytest.approx(2 * row["reward/dark"] + 0.5 * row["reward/sharpness"], rel=1e-5)
    assert "allow_reward_code" not in (args.output_dir / "config.yaml").read_text(), "consent is not passed on"


def test_images_have_the_resolution_asked_for(small, train_prompts):
    seen = []

    def spy(images, prompts, metadata):
        seen.append(tuple(images.shape[2:]))
        return images.mean((1, 2, 3))

    args = small(resolution=32, num_groups=2, group_size=2)
    collect(FlowGRPOTrainer(args=args, reward_funcs=spy, train_dataset=train_prompts[:2]))
    assert set(seen) == {(32, 32)}
