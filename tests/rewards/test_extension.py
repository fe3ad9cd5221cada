"""A reward in a user's file of a few lines works in every command that takes rewards, with no edit of the package."""

import json

import numpy as np
import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.config.sections import RewardConfig
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PIPELINE, PROMPTS
from tests.reliability.compare import same_checkpoint
from tests.reliability.trainers import TRAINERS, short

CODE = """\
from diffalign import register
from diffalign.rewards import FunctionReward, RewardCard


@register("warmth", RewardCard("how much redder than blue an image is", scale=0.1))
def warmth(name, strength=1.0):
    def score(images, prompts, metadata):
        return strength * (images[:, 0] - images[:, 2]).mean((1, 2))

    return FunctionReward(name, score, differentiable=True, range=(-strength, strength))
"""
PLAIN = """\
def warmth(images, prompts, metadata):
    return (images[:, 0] - images[:, 2]).mean((1, 2))
"""
GRPO, REFL = "flow_grpo", "refl"


@pytest.fixture(params=[CODE, PLAIN], ids=["registered", "function"])
def spec(request, tmp_path, monkeypatch):
    """``file.py:warmth``; what the file registers is removed from the registry afterwards."""
    from diffalign.rewards import base

    monkeypatch.setattr(base, "REWARDS", dict(base.REWARDS))
    (tmp_path / "my_rewards.py").write_text(request.param)
    return f"{tmp_path}/my_rewards.py:warmth"


def run(name, folder, spec, **changes):
    args = short(name, folder, rewards={"warmth": RewardConfig(reward=spec)}, allow_reward_code=True, **changes)
    TRAINERS[name].make(args).train()
    return folder


@pytest.mark.parametrize("spec", [CODE], ids=["registered"], indirect=True)
@pytest.mark.parametrize("name", [GRPO, REFL])
def test_it_trains_and_resumes_bit_exactly(name, spec, tmp_path):
    straight = run(name, tmp_path / "straight", spec)
    resumed = run(name, tmp_path / "resumed", spec, resume_from_checkpoint=str(straight / "checkpoint-2"))
    rows = MetricsLog.read(straight / "metrics.jsonl")
    assert any("warmth" in key for row in rows for key in row)
    same_checkpoint(straight / "checkpoint-4", resumed / "checkpoint-4")


def test_it_appears_in_a_dry_run_that_writes_nothing(spec, tmp_path, capsys):
    settings = {
        "model": str(PIPELINE),
        "output_dir": str(tmp_path / "run"),
        "train_prompts": str(PROMPTS / "shapes_train.jsonl"),
        "rewards": {"warmth": {"reward": spec}},
        "num_groups": 1,
        "group_size": 4,
        "rollout_batch_size": 4,
        "train_batch_size": 4,
        "max_train_steps": 1,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    command = ["train", GRPO, "--config", str(tmp_path / "run.yaml"), "--dry_run"]
    assert main(command) == 2, "a file alone is no consent to run code"
    assert main([*command, "--allow_reward_code"]) == 0
    assert "warmth" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_it_scores_files(spec, tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    command = ["score", str(tmp_path / "red.png"), "--rewards", spec, "--prompt", "", "--allow_reward_code"]
    assert main([*command, "--output_dir", str(tmp_path / "scores")]) == 0
    (figures,) = json.loads((tmp_path / "scores/summary.json").read_text())["rewards"].values()
    assert figures["mean"] == pytest.approx(1.0)
