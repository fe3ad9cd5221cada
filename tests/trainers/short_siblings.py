"""A short step-wise preference training that writes what each process ended with: ``test_siblings``."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.state import indexed
from diffalign.trainers.diffusion_dpo.siblings_config import SiblingsConfig
from tests.conftest import PIPELINE, PROMPTS


def fixed(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Rank the three children of a state by its prompt and time, whatever they are.

    Two nearly equal children would be ranked by a rounding, from the second iteration on.
    """
    names = [
        f"{text}/{own.get('time', 0):.3f}/{i % 3}" for i, (text, own) in enumerate(zip(prompts, metadata, strict=True))
    ]
    return torch.tensor([zlib.crc32(name.encode()) / 2**32 for name in names])


def write(folder: Path, preset: str) -> None:
    """Train four steps."""
    args = DiffusionDPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_prompts=PROMPTS / "shapes_train.jsonl",
        output_dir=folder / "run",
        lora=LoraConfig(rank=4),
        pairs="siblings",
        siblings=SiblingsConfig(preset) if preset == "d3po" else SiblingsConfig(preset, first_step=1),
        loss=preset,
        beta=1.0,
        plan=PlanConfig("flow_grpo", num_steps=4, solver="cps"),
        num_groups=4,
        group_size=3,
        max_train_steps=4,
        learning_rate=1e-5,
        adam_epsilon=0.1,  # else Adam takes signs of gradients that are nearly 0
        max_grad_norm=1e9,
        cache=False,
    )
    trainer = DiffusionDPOTrainer(args=args, reward_funcs={"brightness": 1.0} if preset == "d3po" else fixed)
    start = {name: t.detach().clone() for name, t in indexed(trainer.loop.state.parameters).items()}
    sampled = trainer.algorithm.sample(0).rollout.state_dict()["x"].cpu()
    trainer.train()
    trained = indexed(trainer.loop.state.parameters)
    found = {f"moved/{name}": (t.detach() - start[name]).contiguous() for name, t in trained.items()}
    found |= {"world": torch.tensor(trainer.run.accelerator.num_processes), "x": sampled.contiguous()}
    save_file(found, folder / f"{trainer.run.accelerator.process_index}.safetensors")
