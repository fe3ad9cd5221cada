"""A short forward-process RL that writes what each process saw, for ``test_forward_rl_processes``."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.state import indexed
from tests.trainers.made_forward_rl import config, trainer_of


def write(folder: Path, preset: str, updates: int) -> None:
    """Three groups of four: the second is split between two processes."""
    args = config(
        folder,
        preset,
        num_groups=3,
        group_size=4,
        rollout_batch_size=6,
        train_batch_size=4,
        num_times=2,
        updates_per_rollout=updates,
        plan=PlanConfig("ode", num_steps=4),
        max_train_steps=4,
        max_grad_norm=1e9,
        adam_epsilon=1e-6,  # gradients that are all rounding take no steps
    )
    trainer, gradients = trainer_of(args), list[torch.Tensor]()
    parameters = trainer.loop.state.parameters

    def keep(*_: object) -> None:
        if not gradients:
            gradients.extend(p.grad.clone() for p in parameters)

    trainer.loop.state.optimizer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    found = {f"grad/{name}": t for name, t in indexed(gradients).items()}
    found |= {f"weight/{name}": t for name, t in indexed(parameters).items()}
    found |= {f"copy/{name}": t for name, t in trainer.algorithm.copies.state_dict().items()}
    found["world"] = torch.tensor(trainer.run.world)
    save_file({name: t.detach().contiguous() for name, t in found.items()}, folder / f"{trainer.run.rank}.safetensors")
