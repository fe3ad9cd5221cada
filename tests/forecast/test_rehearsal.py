"""A rehearsal on fake tensors forecasts what a run allocates and computes."""

import dataclasses

import pytest

from diffalign.forecast.rehearsal import rehearse
from diffalign.rewards.base import FunctionReward
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT
from tests.forecast.measured import measure

PLAN = {"preset": "first_steps", "num_steps": 2, "window_size": 1}
ONLINE = {"train_prompts": str(ROOT / "assets/prompts/shapes_train.jsonl"), "num_groups": 2, "group_size": 4}
BATCHES = {"rollout_batch_size": 8, "train_batch_size": 8}
TRIALS = {
    "flow_grpo": ONLINE | BATCHES | {"plan": PLAN, "updates_per_rollout": 1},
    "diffusion_dpo": {
        "train_data": [str(ROOT / "assets/preferences/shapes.parquet")],
        "data": {"scan": 4},
        "num_pairs": 4,
        "train_batch_size": 4,
    },
    "refl": ONLINE | BATCHES | {"recipe": {"preset": "draft_1", "num_steps": 2}},
}


def brightness():
    return FunctionReward("brightness", lambda images, prompts, metadata: images.mean((1, 2, 3)), differentiable=True)


def settings(trainer, model, tmp_path, **more):
    from diffalign.config import from_dict

    entry = find_algorithm(trainer)
    known = {field.name for field in dataclasses.fields(entry.config)}
    table = {"model": str(model), "output_dir": str(tmp_path), "lora": {"rank": 4}, **TRIALS[trainer], **more}
    if trainer != "diffusion_dpo":
        table |= {"rewards": {"jpeg_compressibility": 1.0} if trainer == "flow_grpo" else {"pickscore": 1.0}}
    return entry, from_dict(entry.config, {key: value for key, value in table.items() if key in known})


def both(trainer, model, tmp_path, **more):
    """The measured and the rehearsed peaks of an iteration on this CPU."""
    entry, config = settings(trainer, model, tmp_path, **more)
    reward = None if trainer == "diffusion_dpo" else brightness()
    found = measure(entry.trainer(args=config, reward_funcs=reward))
    rehearsed = rehearse(entry, config, block=64, cpu=True)
    return found, {
        "sample": max(rehearsed.peak_of("sample"), rehearsed.peak_of("score")),
        "train": rehearsed.peak_of("train"),
    }


@pytest.mark.parametrize("trainer", TRIALS)
def test_the_rehearsed_peak_is_the_measured_one(trainer, tmp_path):
    found, rehearsed = both(trainer, ROOT / "assets/shapes-sd3", tmp_path)
    assert rehearsed == pytest.approx(found, rel=0.2)
