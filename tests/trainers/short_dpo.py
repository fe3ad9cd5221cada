"""A short Diffusion-DPO that writes what each process saw, for ``test_diffusion_dpo_processes``."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, LoraConfig
from diffalign.data.config import PreferenceDataConfig
from diffalign.runtime.state import indexed
from tests.conftest import PIPELINE, ROOT
from tests.phases import collect


def write(folder: Path, loss: str) -> None:
    args = DiffusionDPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_data=(str(ROOT / "assets/preferences/shapes.parquet"),),
        data=PreferenceDataConfig(scan=8),
        output_dir=folder / "run",
        lora=LoraConfig(rank=4),
        loss=loss,
        beta=300.0,
        num_pairs=8,
        train_batch_size=4,
        max_train_steps=5,
        max_grad_norm=1e9,
        cache=False,
    )
    trainer = DiffusionDPOTrainer(args=args)
    accelerator = trainer.run.accelerator
    batch = collect(trainer, 0)
    first, _ = trainer.algorithm.denoise(batch.ranked, torch.arange(len(batch.ranked.texts)), 0)
    target, texts = first[0].target.clone(), list(batch.ranked.texts)
    trainer.train()
    found = {f"weight/{name}": t for name, t in indexed(trainer.loop.state.parameters).items()}
    found |= {"world": torch.tensor(accelerator.num_processes), "target": target}
    rank = accelerator.process_index
    save_file({name: t.detach().contiguous() for name, t in found.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.txt").write_text("\n".join(texts))
