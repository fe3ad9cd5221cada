"""Updates of Flow-GRPO in which few samples teach, for ``test_balance``: each process writes what it saw."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.rewards.support.probe import untried
from diffalign.rollout.collector import Rollout
from tests.conftest import PIPELINE, PROMPTS
from tests.phases import collect

# One of two groups teaches, whose samples are all on one of two processes.
SCORES = torch.tensor([[1.0, 2.0, 4.0, 7.0], [1.0] * 4])
FLAT = torch.ones(2, 4)


def trainer_of(folder: Path, scores: list[Tensor]) -> FlowGRPOTrainer:
    """One whose iterations find these scores, (groups, group size) each, one after the other."""
    args = FlowGRPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_prompts=PROMPTS / "shapes_train.jsonl",
        output_dir=folder / "run",
        lora=LoraConfig(rank=2),
        plan=PlanConfig(preset="first_steps", num_steps=3, window_size=2),
        loss="grpo_guard",
        clip_range=1e-3,
        clip_unit="per_dim",
        num_groups=2,
        group_size=4,
        rollout_batch_size=4,
        train_batch_size=2,
        max_train_steps=2,
        shared_start=False,
    )
    found: list[float] = []
    with untried():  # each call takes the scores that come next
        trainer = FlowGRPOTrainer(
            args=args, reward_funcs=lambda images, *_: torch.tensor([found.pop(0) for _ in images])
        )
    rank, world = trainer.run.accelerator.process_index, trainer.run.accelerator.num_processes
    found += torch.cat([each.flatten().chunk(world)[rank] for each in scores]).tolist()
    trainer.outputs.finish = lambda: None
    return trainer


def gradients(trainer: FlowGRPOTrainer, batch: Rollout, filtering: bool) -> dict[str, Tensor]:
    """Those of the update of a first iteration, the mean over processes, and the images of each of its passes."""
    trainer.args.filter_zero_advantage = filtering
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    images: list[int] = []
    hook = trainer.model.raw_denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: images.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with trainer.run.accelerator.no_sync(trainer.loop.state.module):
        for micro in minibatch.micros:
            (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
    hook.remove()
    own = torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])
    trainer.loop.state.optimizer.zero_grad()
    return {"gradient": trainer.run.accelerator.reduce(own, "mean"), "passes": torch.tensor(images)}


def seen(folder: Path) -> dict[str, Tensor]:
    """Gradients of all and of few samples; then the weights after two iterations, the first of which is flat."""
    trainer = trainer_of(folder, [SCORES, FLAT, SCORES])
    batch = collect(trainer, 0)
    found = {
        f"{name}/{key}": t for name in ("all", "few") for key, t in gradients(trainer, batch, name == "few").items()
    }
    found["before"] = torch.cat([p.detach().flatten() for p in trainer.loop.state.parameters])
    trainer.train()
    found["after"] = torch.cat([p.detach().flatten() for p in trainer.loop.state.parameters])
    return found | {"rank": torch.tensor(trainer.run.accelerator.process_index)}


def write(folder: Path) -> None:
    """What this process saw, into the folder."""
    found = seen(folder)
    save_file(found, folder / f"{found['rank']}.safetensors")
