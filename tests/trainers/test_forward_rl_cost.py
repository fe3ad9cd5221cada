"""What a dry run counts is what a run of forward-process RL computes, to the unit; what has no weight is not run."""

import pytest
import torch

from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan import PlanConfig
from diffalign.forecast.cost import run_work
from diffalign.trainers.cost import Share
from diffalign.trainers.forward_rl.lag import LagConfig
from diffalign.trainers.forward_rl.presets import PRESETS
from diffalign.trainers.registry import find_algorithm
from tests.conftest import PROMPTS
from tests.trainers.made_forward_rl import config, trainer_of

COST = find_algorithm("forward_rl").cost


def counted(trainer):
    """Run it; return images through the denoiser, (with gradients, without)."""
    calls = {True: 0, False: 0}

    def count(module, args, kwargs):
        calls[torch.is_grad_enabled()] += len(kwargs["hidden_states"])

    trainer.model.raw_denoiser.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    return calls[True], calls[False]


def expected(args, held_out=0):
    work = run_work(COST, args, Share(), held_out)
    return work.training, work.evaluations - work.training


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_of_each_preset_computes_what_was_forecast(preset, tmp_path):
    trainer = trainer_of(config(tmp_path, preset))
    assert counted(trainer) == expected(trainer.args)


VARIANTS = {
    "a ratio per image, whose times are in several passes": (
        "awm",
        {
            "objective_options": {"sum_first": 1.0},
            "num_times": 2,
            "updates_per_rollout": 2,
            "max_train_steps": 2,
            "train_batch_size": 1,
        },
    ),
    "an anchor with guidance, and guided rollouts": ("nft", {"reference_guidance": 3.0, "guidance_scale": 2.0}),
    "passes that cut groups, of several times": ("dgpo", {"train_batch_size": 3, "train_times_per_forward": 2}),
    "two updates on two copies": ("awm", {"updates_per_rollout": 2, "max_train_steps": 3, "train_batch_size": 3}),
    "a solver of second order": ("nft", {"plan": PlanConfig("ode", num_steps=3, ode_solver="dpmpp_2m")}),
    "a stochastic plan from a shared start": (
        "nft",
        {"plan": PlanConfig("flow_grpo_fast", num_steps=5, window_size=1, window_range=(2, 3)), "shared_start": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_variants_computes_what_was_forecast(variant, tmp_path):
    preset, changes = VARIANTS[variant]
    held_out = load_prompts(PROMPTS / "shapes_validation.jsonl", 2)
    trainer = trainer_of(config(tmp_path, preset, eval_images_per_prompt=1, **changes), eval_dataset=held_out)
    assert counted(trainer) == expected(trainer.args, 2)


# Per image and time: evaluations besides the policy's own.
PASSES = {
    "nft with its anchor": ("nft", {}, 2),
    "nft without an anchor": ("nft", {"reference_weight": 0.0}, 1),
    "on-policy nft": ("nft", {"reference_weight": 0.0, "old_lag": LagConfig("current")}, 0),
    "awm with both anchors": ("awm", {}, 2),
    "awm without anchors": ("awm", {"reference_weight": 0.0, "ema_weight": 0.0}, 0),
    "dgpo without clipping": ("dgpo", {"objective_options": {"clip_range": float("inf")}}, 1),
    "dgpo with clipping": ("dgpo", {}, 2),
    "dgpo against lagged weights": (
        "dgpo",
        {"reference_weight": 0.0, "objective_options": {"lagged_reference": 1.0}},
        1,
    ),
    "a ratio per image in passes of all its times": (
        "awm",
        {
            "reference_weight": 0.0,
            "ema_weight": 0.0,
            "updates_per_rollout": 2,
            "train_times_per_forward": 2,
            "objective_options": {"sum_first": 1.0},
        },
        1,
    ),
    "ram": ("ram", {}, 2),
    "ram with an anchor, which is the same pass": ("ram", {"reference_weight": 0.1}, 2),
    "ram with a guided anchor": ("ram", {"reference_weight": 0.1, "reference_guidance": 2.0}, 4),
}


@pytest.mark.parametrize("name", PASSES)
def test_only_passes_with_a_weight_are_run(name, tmp_path):
    preset, changes, comparing = PASSES[name]
    args = config(tmp_path, preset, **changes)
    work = COST.iteration(args, Share(), 0, args.updates_per_rollout)
    images = args.num_groups * args.group_size * args.times_per_image
    assert (work.training, work.comparing) == (images, images * comparing)


def test_a_run_without_a_reference_keeps_none(tmp_path):
    kind = find_algorithm("forward_rl").algorithm
    assert kind.keeps_reference(config(tmp_path, "nft"))
    assert not kind.keeps_reference(config(tmp_path, "nft", reference_weight=0.0))
