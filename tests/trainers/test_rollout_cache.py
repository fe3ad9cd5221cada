"""The rollout's cache and guidance: on while images are sampled, never while a pass trains or an evaluation samples."""

import pytest
import torch

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, FlowGRPOConfig
from diffalign.config import parse
from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.rollout.cache_config import RolloutCacheConfig
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PIPELINE, PROMPTS
from tests.models.families import FAMILIES
from tests.trainers.made_forward_rl import config, redness, trainer_of

ALWAYS = RolloutCacheConfig(kind="first_block", threshold=1e9)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    FAMILIES["flux_dev"].build().save_pretrained(folder)
    return str(folder)


def on_flux(folder, flux, **changes):
    given = {"model": flux, "max_sequence_length": 24, "resolution": 16, "rollout_cache": ALWAYS}
    given |= {"guidance_scale": 1.0, "eval_images_per_prompt": 1}
    return config(folder, **(given | changes))


def observed(trainer):
    """Train it; return (cached, phase) of every call of the denoiser, and of the calls with gradients."""
    calls, module = [], trainer.model.raw_denoiser

    def note(*_):
        calls.append((module.is_cache_enabled, trainer.loop.phase, torch.is_grad_enabled()))

    module.register_forward_pre_hook(note)
    trainer.train()
    return calls


def online_dpo(args):
    fields = ("model", "max_sequence_length", "resolution", "rollout_cache", "guidance_scale", "eval_images_per_prompt",
              "output_dir", "lora", "num_groups", "group_size", "rollout_batch_size", "train_batch_size")  # fmt: skip
    given = {name: getattr(args, name) for name in fields}
    args = DiffusionDPOConfig(
        **given, plan=PlanConfig("ode", num_steps=4), shared_start=False, max_train_steps=2, learning_rate=1e-3,
        train_prompts=PROMPTS / "shapes_train.jsonl",
    )  # fmt: skip
    return DiffusionDPOTrainer(args=args, reward_funcs=redness, eval_dataset=held_out())


def held_out():
    return load_prompts(PROMPTS / "shapes_validation.jsonl", 2)


@pytest.mark.parametrize("method", ["forward_rl", "online_dpo"])
def test_rollouts_alone_are_cached(method, tmp_path, flux):
    args = on_flux(tmp_path, flux)
    trainer = online_dpo(args) if method == "online_dpo" else trainer_of(args, eval_dataset=held_out())
    calls = observed(trainer)
    phases = {phase for _, phase, _ in calls}
    assert {"sample", "update", "evaluate"} <= phases
    assert all(cached == (phase == "sample") for cached, phase, _ in calls)
    assert not any(cached and grad for cached, _, grad in calls)
    assert any(grad for _, _, grad in calls)
    rows = [row for row in MetricsLog.read(tmp_path / "run/metrics.jsonl") if "reward/mean" in row]
    assert [row["cache/computed_share"] for row in rows] == [0.25, 0.25]  # the first of four steps


def test_a_cache_that_skips_nothing_changes_nothing(tmp_path, flux):
    found = []
    for name, cache in (("none", RolloutCacheConfig()), ("all", RolloutCacheConfig("first_block", threshold=1e-9))):
        trainer_of(on_flux(tmp_path / name, flux, rollout_cache=cache)).train()
        rows = MetricsLog.read(tmp_path / name / "run/metrics.jsonl")
        found.append([(row["reward/mean"], row["loss"]) for row in rows if "loss" in row])
    assert found[0] == found[1]


def test_a_pipeline_without_caches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="diffusers has no caches for SD3Transformer2DModel"):
        trainer_of(config(tmp_path, rollout_cache=ALWAYS))


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (FlowGRPOConfig, ["--rollout_cache", "first_block"], "has no density"),
        (DiffusionDPOConfig, ["--rollout_cache", "taylorseer"], "read only online"),
    ],
)
def test_it_is_refused_where_a_density_is_needed_or_nothing_is_sampled(kind, arguments, words):
    given = ["--model", str(PIPELINE), "--train_data", "x"] if kind is DiffusionDPOConfig else ["--model", "x"]
    with pytest.raises(ValueError, match=words):
        parse(kind, [*given, *arguments]).validate()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compile": True}, "give one of them"),
        ({"rollout_cache": RolloutCacheConfig("taylorseer")}, None),
    ],
)
def test_combinations(changes, words, tmp_path):
    args = config(tmp_path, **({"rollout_cache": ALWAYS} | changes))
    if words is None:
        args.validate()
        with pytest.raises(ValueError, match=r"launch with ddp\.yaml"):
            args.validate_shards()
        return
    with pytest.raises(ValueError, match=words):
        args.validate()


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_guidance_of_the_rollout_does_not_reach_training(solver, tmp_path, monkeypatch):
    plan = PlanConfig("ode", num_steps=3, **({} if solver == "euler" else {"ode_solver": solver}))
    trainer = trainer_of(config(tmp_path, guidance_scale=3.0, plan=plan, max_train_steps=1))
    scales, predict = {"sample": set(), "update": set()}, type(trainer.model).predict

    def recorded(self, x, level, conditioning, guidance=None):
        scales.setdefault(trainer.loop.phase, set()).add(None if guidance is None else guidance.scale)
        return predict(self, x, level, conditioning, guidance)

    monkeypatch.setattr(type(trainer.model), "predict", recorded)
    trainer.train()
    assert scales["sample"] == {3.0}
    assert scales["update"] == {None}
