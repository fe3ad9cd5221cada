"""A short training of trees that writes what each process ended with: ``test_tree_methods``."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.state import indexed
from tests.conftest import PIPELINE, PROMPTS

METHODS = {
    "branch": {"plan": PlanConfig("branch_grpo", num_steps=5, split_steps=(0, 2)), "group_size": 4},
    "g2": {"plan": PlanConfig("g2", num_steps=5, branch=(2,)), "group_size": 8},
    "fdfo": {
        "plan": PlanConfig("fdfo", num_steps=4),
        "group_size": 2,
        "loss": "fdfo",
        "advantage_std": "unit",
        "clip_range": 0.03,
        "clip_unit": "per_dim",
    },
}


def write(folder: Path, method: str) -> None:
    """Train three steps."""
    args = FlowGRPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_prompts=PROMPTS / "shapes_train.jsonl",
        output_dir=folder / "run",
        lora=LoraConfig(rank=4),
        rewards={"brightness": 1.0},
        num_groups=4,
        rollout_batch_size=8,
        train_batch_size=8,
        max_train_steps=3,
        learning_rate=1e-5,
        adam_epsilon=0.1,  # else Adam takes signs of gradients that are nearly 0
        max_grad_norm=1e9,
        **METHODS[method],
    )
    trainer = FlowGRPOTrainer(args=args)
    start = {name: t.detach().clone() for name, t in indexed(trainer.loop.state.parameters).items()}
    trainer.train()
    found = {"world": torch.tensor(trainer.run.world)}
    trained = indexed(trainer.loop.state.parameters)
    found |= {f"moved/{name}": (t.detach() - start[name]).contiguous() for name, t in trained.items()}
    save_file(found, folder / f"{trainer.run.accelerator.process_index}.safetensors")
