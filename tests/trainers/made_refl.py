"""What the tests of ReFL's trainer share: a reward with a gradient, a configuration of seconds, gradients."""

from __future__ import annotations

import dataclasses

import torch

from diffalign import LoraConfig, ReFLConfig, ReFLTrainer
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.rewards.base import FunctionReward
from tests.conftest import PIPELINE, ROOT
from tests.phases import collect

IMAGES = str(ROOT / "assets/preferences/shapes.parquet")


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def differentiable(function):
    return FunctionReward(function.__name__, function, differentiable=True)


REDNESS = differentiable(redness)


def config(folder, preset="refl_script", recipe=None, **changes) -> ReFLConfig:
    """One that trains in seconds; keyword arguments override it, those of the recipe in a dict of their own."""
    given = {"num_steps": 4, **(recipe or {})}
    # Four steps hold no five, and a reward that reads no text is none relative to words.
    own = {
        "draft_k": {"gradient_steps": 2},
        "srpo": {"word_weight": (0.5, 0.5), "word_weight_inverted": (0.5, 0.5), "window": (0.0, 1.0)},
    }.get(preset, {})
    resolved = RecipeConfig(preset=preset, **{**own, **given})
    found = resolved.resolve()
    settings = {
        "model": str(PIPELINE),
        "max_sequence_length": 16,
        "output_dir": folder / "run",
        "lora": LoraConfig(rank=4),
        "recipe": resolved,
        "num_groups": 4,
        "rollout_batch_size": 2,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
    }
    if found.reward_loss in ("hinge", "distance"):
        settings["thresholds"] = {"redness": 0.9}
    if found.from_images or found.regulariser == "pretraining":
        settings["train_images"] = (IMAGES,)
        settings["data"] = dataclasses.replace(ReFLConfig().data, scan=4)
    if found.negative:
        settings["guidance_scale"] = 2.0
    return ReFLConfig(**(settings | changes))


def trainer_of(args, prompts, **options):
    own = args.train_rollouts or args.recipe.resolve().from_images
    return ReFLTrainer(
        args=args, reward_funcs=options.pop("reward", REDNESS), train_dataset=None if own else prompts, **options
    )


def moved(trainer):
    """Away from the start, where one half of a LoRA is zero and the other has no gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.loop.state.parameters:
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return trainer


def gradients(trainer):
    """Return the gradient of a first iteration, away from the start."""
    return gradients_of(trainer, collect(moved(trainer)))


def gradients_of(trainer, batch):
    """Return the gradient of the update on an iteration's data, without taking it."""
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    for micro in minibatch.micros:
        trainer.run.accelerator.backward(trainer.algorithm.loss(micro)[0] * micro.weight)
    found = torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])
    trainer.loop.state.optimizer.zero_grad()
    return found


def close(one, two, tolerance):
    assert two.norm() > 0
    assert (one - two).norm() < tolerance * two.norm(), (one - two).norm() / two.norm()
