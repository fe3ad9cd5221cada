"""A short ReFL that writes what each process trained, for ``test_refl_processes``."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign.data.prompts import load_prompts
from diffalign.runtime.state import indexed
from tests.conftest import PROMPTS
from tests.phases import collect
from tests.trainers.made_refl import config, trainer_of


def write(folder: Path, preset: str) -> None:
    # Rollouts of four: processes of eight and of four images draw the same courses for the same images.
    args = config(folder, preset, num_groups=8, rollout_batch_size=4, max_train_steps=3, max_grad_norm=1e9)
    trainer = trainer_of(args, load_prompts(PROMPTS / "shapes_train.jsonl")[::70])
    trainer.train()
    accelerator = trainer.run.accelerator
    found = {f"weight/{name}": t for name, t in indexed(trainer.loop.state.parameters).items()}
    found |= {"world": torch.tensor(accelerator.num_processes)}
    found |= {"courses": torch.tensor([len(batch.courses[0].moves) for batch in collect(trainer, 2).parts])}
    rank = accelerator.process_index
    save_file({name: t.detach().contiguous() for name, t in found.items()}, folder / f"{rank}.safetensors")
