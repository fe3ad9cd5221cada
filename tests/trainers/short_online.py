"""Short trainings on single images of the model's own, which write what each process ended with: ``test_company``."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, LoraConfig
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.rollouts import Pairing
from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.state import indexed
from tests.conftest import PIPELINE, PROMPTS


def train(folder: Path, loss: str) -> DiffusionDPOTrainer:
    """Three steps, of which the first has no example in its second group, and the second none in its first."""
    flat = []

    def brightness(images, texts, metadata):
        return images.mean((1, 2, 3)) * torch.tensor([text not in flat for text in texts])

    args = DiffusionDPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_prompts=PROMPTS / "shapes_train.jsonl",
        data=PreferenceDataConfig(rollouts=Pairing(rule="all")),
        output_dir=folder / loss,
        lora=LoraConfig(rank=4),
        loss=loss,
        beta=300.0,
        plan=PlanConfig(preset="ode", num_steps=2),
        num_groups=2,
        group_size=3,
        shared_start=False,
        train_batch_size=8,
        max_train_steps=3,
        max_grad_norm=1e9,
        cache=False,
    )
    trainer = DiffusionDPOTrainer(args=args, reward_funcs=brightness)
    prompts = trainer.algorithm.source.collector.prompts_of
    flat += [prompts(0)[1].text, prompts(1)[0].text]
    trainer.train()
    return trainer


def write(folder: Path) -> None:
    found = {}
    for loss in ("kto", "bco"):
        trainer = train(folder, loss)
        weights = indexed(trainer.loop.state.parameters)
        found |= {f"{loss}/{name}": t.detach().contiguous() for name, t in weights.items()}
        if loss == "bco":
            found |= {"shift/bco": trainer.algorithm.single.context.value.reshape(())}
    found |= {"world": torch.tensor(trainer.run.accelerator.num_processes)}
    save_file(found, folder / f"{trainer.run.accelerator.process_index}.safetensors")
