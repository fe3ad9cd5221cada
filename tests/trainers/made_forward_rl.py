"""What the tests of forward-process RL share: configurations of seconds, gradients, counts of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffalign import ForwardRLConfig, ForwardRLTrainer, LoraConfig
from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan import PlanConfig
from tests.conftest import PIPELINE, PROMPTS, ROOT
from tests.phases import collect

EPSILON = ROOT / "assets/shapes-sd"
FEW = {"awm": {"num_times": 2}, "dgpo": {"num_times": 2}, "v_grpo": {"num_times": 2}, "crd": {"num_times": 2}}


def redness(images: torch.Tensor, *_: Any) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def config(folder: Path, preset: str = "nft", **changes: Any) -> ForwardRLConfig:
    """One that trains in a second; keyword arguments override it."""
    settings = {
        "model": str(PIPELINE),
        "max_sequence_length": 16,
        "output_dir": folder / "run",
        "preset": preset,
        "lora": LoraConfig(rank=2),
        "plan": PlanConfig("ode", num_steps=4),
        "num_groups": 2,
        "group_size": 2,
        "rollout_batch_size": 4,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        **FEW.get(preset, {}),
    }
    return ForwardRLConfig(**(settings | changes))


def trainer_of(args: ForwardRLConfig, reward: Any = redness, **options: Any) -> ForwardRLTrainer:
    """A trainer on prompts of each task type."""
    prompts = load_prompts(PROMPTS / "shapes_train.jsonl")[::70]
    return ForwardRLTrainer(args=args, reward_funcs=reward, **({"train_dataset": prompts} | options))


def gradient(trainer: ForwardRLTrainer, batch: Any = None, iteration: int = 0) -> torch.Tensor:
    """The gradient of the first update of an iteration, without taking it."""
    batch = collect(trainer, iteration) if batch is None else batch
    minibatch = next(iter(trainer.algorithm.minibatches(batch, iteration)))
    for micro in minibatch.micros:
        (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
    found = torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])
    trainer.loop.state.optimizer.zero_grad()
    return found


def stir(trainer: ForwardRLTrainer, size: float = 0.02) -> None:
    """Move the policy away from its copies and the base model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.loop.state.parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
