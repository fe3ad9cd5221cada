"""A short training that writes what each process saw; ``test_processes`` runs it alone and with a launcher."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.rewards.support.probe import untried
from diffalign.runtime.state import indexed
from tests.conftest import PIPELINE, PROMPTS


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    images, prompts, gradients = [], [], []

    def brightness(batch, texts, metadata):
        images.append(batch.clone())
        prompts.extend(texts)
        return batch.mean((1, 2, 3)) - batch[:, 0].mean((1, 2))

    args = FlowGRPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_prompts=PROMPTS / "shapes_train.jsonl",
        output_dir=folder / "run",
        lora=LoraConfig(rank=4),
        plan=PlanConfig(preset="first_steps", num_steps=3, window_size=2),
        num_groups=3,
        group_size=4,
        rollout_batch_size=6,
        train_batch_size=6,
        max_train_steps=10,
        max_grad_norm=1e9,
        guidance_scale=2.0,
        kl_beta=0.01,
        advantage_std="global",
        save_rollouts=True,
    )
    with untried():  # what it sees is the run's
        trainer = FlowGRPOTrainer(args=args, reward_funcs=brightness)
    parameters = trainer.loop.state.parameters

    def keep(*_):
        if not gradients:
            gradients.extend(p.grad.clone() for p in parameters)

    trainer.loop.state.optimizer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    accelerator = trainer.run.accelerator
    found = {f"grad/{name}": t for name, t in indexed(gradients).items()}
    found |= {f"weight/{name}": t for name, t in indexed(parameters).items()}
    share = 12 // accelerator.num_processes
    found |= {"world": torch.tensor(accelerator.num_processes), "images": torch.cat(images)[:share]}
    rank = accelerator.process_index
    save_file({name: t.contiguous() for name, t in found.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.txt").write_text("\n".join(prompts[:share]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
