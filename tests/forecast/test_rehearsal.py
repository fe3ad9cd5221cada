"""A rehearsal on fake tensors forecasts what a run allocates and computes."""

import dataclasses
from contextlib import nullcontext

import pytest
from diffusers import DiffusionPipeline, SD3Transformer2DModel

from diffalign.config import from_dict
from diffalign.forecast import rehearsal
from diffalign.forecast.counter import Counter
from diffalign.forecast.fake_rewards import JUDGING, RehearsedReward
from diffalign.forecast.rehearsal import EVALUATING, WEIGHTS, rehearse
from diffalign.forecast.stand_ins import FiniteValues
from diffalign.models.weight_memory import Spread
from diffalign.rewards import get_reward
from diffalign.rewards.base import FunctionReward
from diffalign.trainers.diffusion_dpo import siblings
from diffalign.trainers.registry import find_algorithm
from tests.conftest import PIPELINE, ROOT
from tests.forecast.measured import measure
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES

JUDGE = {"options": {name: str(ROOT / "assets/judges/pickscore") for name in ("path", "tokenizer")}}
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
    "forward_rl": ONLINE | BATCHES | {"plan": {"preset": "ode", "num_steps": 2}, "num_times": 1},
    "refl": ONLINE | BATCHES | {"recipe": {"preset": "draft_1", "num_steps": 2}},
}


def brightness():
    return FunctionReward("brightness", lambda images, prompts, metadata: images.mean((1, 2, 3)), differentiable=True)


def settings(trainer, model, tmp_path, **more):
    entry = find_algorithm(trainer)
    known = {field.name for field in dataclasses.fields(entry.config)}
    table = {"model": str(model), "output_dir": str(tmp_path), "lora": {"rank": 4}, **TRIALS[trainer], **more}
    if trainer != "diffusion_dpo":
        table |= {"rewards": {"pickscore": JUDGE} if trainer == "refl" else {"jpeg_compressibility": 1.0}}
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


def test_images_that_are_decoded_one_by_one_are_rehearsed_once(tmp_path):
    """The others are like the first: as many operations as all at once, in less memory."""
    folder = ROOT / "assets/shapes-sd3"
    whole, sliced = (
        rehearse(*settings("refl", folder, tmp_path, vae_checkpointing=True, decode_slice=size)) for size in (0, 1)
    )
    assert sliced.calls == whole.calls
    assert sliced.peak_of("train") < whole.peak_of("train")
    assert sliced.flops["train", "decode"] == pytest.approx(whole.flops["train", "decode"], rel=0.01)


@pytest.mark.slow
def test_nudges_of_alike_steps_are_rehearsed_once(tmp_path, monkeypatch):
    """TailorPO-G: every phase's peak, operations and calls as if each compared step took its gradient."""
    nudged = {"preset": "tailorpo_g", "first_step": 1, "nudge": 0.1}
    more = {
        "pairs": "siblings", "siblings": nudged, "loss": "tailorpo", "rewards": {"pickscore": JUDGE},
        "plan": {"preset": "flow_grpo", "solver": "cps", "num_steps": 4}, **ONLINE, "group_size": 2,
        "rollout_batch_size": 4, "train_batch_size": 4, "gradient_checkpointing": True, "lora": {"rank": 4},
    }  # fmt: skip
    entry = find_algorithm("diffusion_dpo")
    config = from_dict(entry.config, {"model": str(PIPELINE), "output_dir": str(tmp_path), **more})
    taken, gradient = [], siblings.reward_gradient

    def counted(sampler, x, index):
        taken.append(index)
        return gradient(sampler, x, index)

    monkeypatch.setattr(siblings, "reward_gradient", counted)
    one = rehearse(entry, config)
    assert len(taken) == 1
    monkeypatch.setattr(rehearsal, "first_gradients", lambda counter: nullcontext())
    each = rehearse(entry, config)
    assert len(taken) == 1 + 2
    assert (one.flops, one.calls) == (each.flops, each.calls)
    assert one.traffic == pytest.approx(each.traffic, rel=0.01)
    assert all(one.peak_of(phase) == each.peak_of(phase) for phase, _ in each.peaks)
    assert one.peak_of("sample") > one.peak_of("score")


@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("flow_grpo", {"save_rollouts": True}),
        ("flow_grpo", {"cache_dir": "cache"}),
        ("refl", {"early_stopping": 2, "eval_steps": 5, "eval_prompts": ONLINE["train_prompts"]}),
    ],
)
def test_settings_of_files_and_evaluations_do_not_stop_a_rehearsal(trainer, more, tmp_path):
    entry, config = settings(trainer, ROOT / "assets/shapes-sd3", tmp_path, **more)
    assert rehearse(entry, config, block=64, cpu=True).peak > 0
    assert not list(tmp_path.iterdir())


QUICK = ("sd3", "sdxl")  # a transformer and a UNet


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_the_rehearsed_peak_of_every_family_is_the_measured_one(name, tmp_path):
    family, folder = FAMILIES[name], PIPELINE
    if family.build is not None:
        tiny.write(family.build, folder := tmp_path / "model")
    rank = {} if family.lora else {"lora": {"rank": 0}}
    found, rehearsed = both(
        "diffusion_dpo", folder, tmp_path / "run", num_pairs=16, train_batch_size=16, **rank, **family.options
    )
    assert rehearsed["train"] == pytest.approx(found["train"], rel=0.2)


@pytest.fixture(scope="module")
def of_100_million(tmp_path_factory):
    """The embedded pipeline with a transformer of about 100 million parameters."""
    folder = tmp_path_factory.mktemp("large")
    pipeline = DiffusionPipeline.from_pretrained(PIPELINE)
    size = {"num_layers": 11, "num_attention_heads": 8, "attention_head_dim": 64, "caption_projection_dim": 512}
    pipeline.transformer = SD3Transformer2DModel.from_config({**pipeline.transformer.config, **size})
    assert 80e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 130e6
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRIALS)
def test_the_rehearsed_peak_of_100_million_parameters_is_within_8_percent(trainer, of_100_million, tmp_path):
    found, rehearsed = both(trainer, of_100_million, tmp_path)
    assert rehearsed == pytest.approx(found, rel=0.08)


@pytest.mark.slow
def test_shards_hold_a_share_of_the_denoiser(tmp_path):
    entry, config = settings("flow_grpo", PIPELINE, tmp_path, lora={"rank": 0})
    one, two = (rehearse(entry, config, 2, spread) for spread in (None, Spread(2)))
    assert all(two.peak_of(phase) < one.peak_of(phase) for phase in ("weights", "sample", "step"))
    assert two.calls == one.calls


@pytest.mark.slow
def test_a_process_of_several_has_its_share_of_the_work(tmp_path):
    entry, config = settings("flow_grpo", PIPELINE, tmp_path)
    one, two = (rehearse(entry, config, world) for world in (1, 2))
    assert two.calls["sample", "evaluate"] * 2 == one.calls["sample", "evaluate"]
    assert two.peak < one.peak


HPS = {"hpsv2.1": {"options": {"path": str(ROOT / "assets/judges/hps")}}}


@pytest.mark.slow
def test_an_evaluation_holds_a_judge_and_a_batch_at_a_time_and_other_phases_hold_none(tmp_path):
    shared = {"eval_prompts": ONLINE["train_prompts"], "rollout_batch_size": 4}
    none, one, two = (
        rehearse(*settings("flow_grpo", PIPELINE, tmp_path, **shared, held_out=judges))
        for judges in ({}, HPS, {**HPS, "pickscore": JUDGE})
    )
    for phase in ("weights", "sample", "score", "train", "step"):
        assert two.peak_of(phase) == one.peak_of(phase) == none.peak_of(phase)
    where = EVALUATING, JUDGING
    assert none.peaks[where] < none.peaks[EVALUATING, "decode"], "what sampled the images is gone"
    assert one.peaks[where] > one.peak_of(WEIGHTS) + size_of("hpsv2.1", HPS["hpsv2.1"])
    assert one.peaks[where] <= two.peaks[where] < one.peaks[where] + size_of("pickscore", JUDGE), "one at a time"
    assert [found.calls[where] for found in (none, one, two)] == [4, 8, 12], "a batch for each reward"
    assert not two.notes


def size_of(name, entry):
    """Bytes of a reward's network."""
    found = RehearsedReward(name, get_reward(name, **entry["options"]), counter := Counter())
    with FiniteValues(), counter, counter.during(EVALUATING):
        found.prepare((32, 32))
    return found.size


def test_judges_of_a_run_that_trains_on_no_reward_are_rehearsed(tmp_path):
    shared = {"eval_prompts": ONLINE["train_prompts"], "held_out": HPS}
    found = rehearse(*settings("diffusion_dpo", PIPELINE, tmp_path, **shared))
    assert found.peaks[EVALUATING, JUDGING] > found.peak_of(WEIGHTS) + size_of("hpsv2.1", HPS["hpsv2.1"])
