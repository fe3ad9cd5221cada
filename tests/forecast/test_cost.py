"""What a forecast counts is what a run computes."""

from dataclasses import replace

import pytest
import torch

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, FlowGRPOTrainer, LoraConfig
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.rollouts import Pairing
from diffalign.diffusion.plan import PlanConfig
from diffalign.diffusion.reward_gradient_presets import PRESETS
from diffalign.forecast.cost import evaluations, iterations, run_work
from diffalign.trainers.cost import Share, Work
from diffalign.trainers.diffusion_dpo.siblings_config import SiblingsConfig
from diffalign.trainers.registry import find_algorithm
from tests.conftest import PIPELINE, ROOT
from tests.trainers.made_refl import config, trainer_of

ALONE = Share()
PAIRS = str(ROOT / "assets/preferences/shapes.parquet")


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def counted(trainer):
    """Runs it; images through the denoiser, (with gradients, without)."""
    calls = {True: 0, False: 0}

    def count(module, args, kwargs):
        calls[torch.is_grad_enabled()] += len(kwargs["hidden_states"])

    trainer.model.raw_denoiser.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    return calls[True], calls[False]


def expected(name, args, held_out=0):
    work = run_work(find_algorithm(name).cost, args, ALONE, held_out)
    return work.training, work.evaluations - work.training


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_beta": 0.01, "guidance_scale": 2.0, "max_train_steps": 1},
        {
            "rollout_batch_size": 3,
            "updates_per_rollout": 2,
            "max_train_steps": 3,
            "old_log_prob": "recompute",
            "plan": PlanConfig("flow_grpo_fast", num_steps=6, window_size=1, window_range=(1, 4)),
        },
        {
            "train_batch_size": 3,
            "train_times_per_forward": 2,
            "old_log_prob": "recompute",
            "max_train_steps": 1,
            "plan": PlanConfig("flow_grpo", num_steps=4, branch=(2, 2)),
            "group_size": 8,
        },
    ],
    ids=["a guided run with a reference", "micro-batches that cut shared steps, and a last update less", "trees"],
)
def test_a_run_of_flow_grpo_computes_what_was_forecast(small, train_prompts, changes):
    args = small(eval_steps=2, eval_images_per_prompt=1, **changes)
    trainer = FlowGRPOTrainer(args=args, reward_funcs=red, train_dataset=train_prompts, eval_dataset=train_prompts[:3])
    assert counted(trainer) == expected("flow_grpo", trainer.args, held_out=3)


def dpo(folder, **changes):
    settings = {
        "model": str(PIPELINE),
        "max_sequence_length": 16,
        "output_dir": folder / "run",
        "lora": LoraConfig(rank=4),
        "train_batch_size": 2,
        "max_train_steps": 2,
        "cache": False,
    }
    return DiffusionDPOConfig(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [{"loss": "dpo"}, {"loss": "cpo"}, {"loss": "kto"}, {"loss": "sft"}, {"loss": "dpo", "streaming": True}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_run_on_data_computes_what_was_forecast(tmp_path, changes):
    args = dpo(tmp_path, train_data=(PAIRS,), data=PreferenceDataConfig(scan=8), num_pairs=3, **changes)
    assert counted(DiffusionDPOTrainer(args=args)) == expected("diffusion_dpo", args)


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft"])
@pytest.mark.parametrize("rule", ["best_worst", "all"])
def test_a_run_on_its_own_images_computes_what_was_forecast(tmp_path, train_prompts, rule, loss):
    args = dpo(
        tmp_path,
        loss=loss,
        num_groups=2,
        group_size=3,
        rollout_batch_size=4,
        shared_start=False,
        plan=PlanConfig("ode", num_steps=3),
        data=PreferenceDataConfig(rollouts=Pairing(rule=rule)),
        train_prompts="named.txt",
        rewards={"jpeg_compressibility": 1.0},
    )
    trainer = DiffusionDPOTrainer(args=args, reward_funcs=red, train_dataset=train_prompts)
    assert counted(trainer) == expected("diffusion_dpo", trainer.args)


@pytest.mark.parametrize(("preset", "guided"), [("spo", 3.0), ("tailorpo_g", 1.0), ("d3po", 1.0)])
def test_a_run_on_its_own_steps_computes_what_was_forecast(tmp_path, train_prompts, preset, guided):
    args = dpo(
        tmp_path,
        loss={"tailorpo_g": "tailorpo"}.get(preset, preset),
        pairs="siblings",
        siblings=SiblingsConfig(preset) if preset == "d3po" else SiblingsConfig(preset, first_step=1),
        num_groups=2,
        group_size=3,
        updates_per_rollout=2,
        rollout_batch_size=4,
        guidance_scale=guided,
        plan=PlanConfig("flow_grpo", num_steps=5, solver="cps"),
        train_prompts="named.txt",
        rewards={"brightness": 1.0},
        max_train_steps=3,
    )
    trainer = DiffusionDPOTrainer(args=args, train_dataset=train_prompts)
    assert counted(trainer) == expected("diffusion_dpo", trainer.args)


def test_a_run_against_an_earlier_self_computes_what_was_forecast(tmp_path):
    args = dpo(
        tmp_path,
        train_data=(PAIRS,),
        data=PreferenceDataConfig(scan=8),
        num_pairs=3,
        losers="reference",
        reference_steps=1,
        guidance_scale=2.0,
        rollout_batch_size=2,
        plan=PlanConfig("ode", num_steps=3),
    )
    assert counted(DiffusionDPOTrainer(args=args)) == expected("diffusion_dpo", args)


def refl_expected(args, held_out=0):
    """Calls that are made again on the way back have gradients as well."""
    work = run_work(find_algorithm("refl").cost, args, ALONE, held_out)
    return work.evaluations if args.step_checkpointing else (work.training, work.evaluations - work.training)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_of_refl_computes_what_was_forecast(tmp_path, train_prompts, preset):
    """Five images, sampled by two: the last batch is smaller, and each draws its own courses."""
    args = config(tmp_path, preset, num_groups=5, guidance_scale=2.0, max_train_steps=1 + (preset == "srpo"))
    trainer = trainer_of(args, train_prompts)
    assert counted(trainer) == refl_expected(trainer.args)


@pytest.mark.parametrize(
    ("preset", "recipe", "changes"),
    [
        ("leapalign", {"regulariser": "reference"}, {"step_checkpointing": True, "guidance_scale": 2.0}),
        ("draft_lv", {"regulariser": "reference"}, {"eval_steps": 1, "lora": LoraConfig(rank=0), "max_train_steps": 1}),
        ("reneg", {}, {"eval_num_steps": 3, "train_batch_size": 1}),
    ],
    ids=["recorded calls made again", "all weights, with evaluations", "a negative prompt, with evaluations"],
)
def test_work_of_refl_outside_its_gradient_paths_was_forecast(tmp_path, train_prompts, preset, recipe, changes):
    args = config(tmp_path, preset, recipe, **changes)
    held_out = [] if args.step_checkpointing else train_prompts[:3]
    trainer = trainer_of(args, train_prompts, eval_dataset=held_out)
    found = counted(trainer)
    assert (sum(found) if args.step_checkpointing else found) == refl_expected(trainer.args, len(held_out))


def test_samplings_that_go_on_from_a_stored_state_are_forecast_from_there(tmp_path, small, train_prompts):
    stored = small(output_dir=tmp_path / "grpo", save_rollouts=True, max_train_steps=1)
    FlowGRPOTrainer(args=stored, reward_funcs=red, train_dataset=train_prompts).train()
    args = config(tmp_path, "refl_script", num_groups=2, train_rollouts=tmp_path / "grpo/rollouts")
    trainer = trainer_of(args, None)
    assert counted(trainer) == refl_expected(trainer.args)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_evaluations_are_those_of_the_loop(small, steps, every):
    args = small(max_train_steps=steps, eval_steps=every)
    done, count = 0, 1
    for _, updates in iterations(steps, 2):
        before, done = done, done + updates
        count += done == steps or (every > 0 and any(step % every == 0 for step in range(before + 1, done + 1)))
    assert evaluations(args, 2) == count


def test_processes_share_the_work(small):
    args = small(num_groups=4, group_size=2, rollout_batch_size=2, max_train_steps=4)
    one = run_work(find_algorithm("flow_grpo").cost, args, ALONE, 5)
    parts = [run_work(find_algorithm("flow_grpo").cost, args, Share(rank, 2), 5) for rank in (0, 1)]
    both = parts[0] + parts[1]
    # The first step's checks are made by each process.
    assert replace(both, comparing=0) == replace(one, comparing=0)
    assert (one.generated, one.training) == (4 * 8, 4 * 8 * 2)
    assert Work(1, 2, 3, 4, 5, 6) + 2 * Work(1, 1, 1, 1, 1, 1) == Work(3, 4, 5, 6, 7, 8)
