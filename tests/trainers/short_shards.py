"""Trainings on weights in shards, for ``test_shards``: two processes of a launcher run them and write what each saw."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.tensor import DTensor

from diffalign import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    LoraConfig,
    Prompt,
    load_model,
)
from diffalign.data.config import PreferenceDataConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.fsdp import full_tensor, local_tensor
from diffalign.models.weights import REFERENCE
from diffalign.runtime.state import indexed
from diffalign.trainers.base import Trainer
from tests.conftest import PIPELINE, PROMPTS, ROOT
from tests.phases import collect
from tests.trainers.made_refl import config, trainer_of

KINDS = {"lora": LoraConfig(rank=4), "full": LoraConfig(rank=0)}
STEPS, SAVED = 3, 2


def run(folder: Path, kind: str, resume: str | None = None) -> DiffusionDPOTrainer:
    """A run of three steps, saved after two; three prompts are evaluated, an odd number."""
    AcceleratorState._reset_state(reset_partial_state=False)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / f"prompts-{distributed.get_rank() if distributed.is_initialized() else 0}.jsonl"
    lines = (PROMPTS / "shapes_validation.jsonl").read_text().splitlines()[:3]
    prompts.write_text("\n".join(lines))
    args = DiffusionDPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_data=(str(ROOT / "assets/preferences/shapes.parquet"),),
        data=PreferenceDataConfig(scan=8),
        output_dir=folder,
        lora=KINDS[kind],
        learning_rate=1e-4,
        adam_epsilon=1e-6,  # gradients that are all rounding take no steps
        ema_decay=0.9,
        beta=300.0,
        num_pairs=4,
        train_batch_size=2,
        max_train_steps=STEPS,
        checkpointing_steps=SAVED,
        resume_from_checkpoint=resume,
        gradient_checkpointing=kind == "full",
        cache=False,
        eval_prompts=prompts,
        eval_rewards=("shapes",),
        eval_images_per_prompt=1,
        eval_num_steps=1,
        rollout_batch_size=1,
    )
    trainer = DiffusionDPOTrainer(args=args)
    trainer.train()
    return trainer


def seen(trainer: DiffusionDPOTrainer) -> dict[str, torch.Tensor]:
    """The weights, put together, and what the denoiser says with each set of them."""
    found = {f"weight/{name}": full_tensor(t).clone() for name, t in indexed(trainer.loop.state.parameters).items()}
    found |= {f"ema/{name}": full_tensor(t).clone() for name, t in indexed(trainer.loop.state.ema.shadow).items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *trainer.model.latent_shape(), generator=generator)
    conditioning = trainer.run.prompts(["a red circle"])
    for name in ("policy", "ema", REFERENCE, "policy"):
        with trainer.model.using(name), torch.no_grad():
            found[f"output/{name}"] = trainer.model.predict(x, trainer.model.levels(4)[1], conditioning)
    return found


def write(trainer: Trainer, found: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    """What this process saw, where all of the denoiser is in shards."""
    parameters = list(trainer.model.raw_denoiser.parameters())
    assert trainer.run.accelerator.num_processes == 2
    assert all(isinstance(p, DTensor) for p in parameters)
    found["local"] = torch.tensor(sum(local_tensor(p).numel() for p in parameters))
    found["all"] = torch.tensor(sum(p.numel() for p in parameters))
    rank = trainer.run.accelerator.process_index
    save_file({n: t.contiguous() for n, t in found.items()}, folder / f"{name}-{rank}.safetensors")


def resumed(folder: Path, other: Path) -> None:
    """Each kind of training from the middle on; ``other`` has the checkpoints."""
    for kind in KINDS:
        trainer = run(folder / kind, kind, str(other / kind / f"checkpoint-{SAVED}"))
        write(trainer, seen(trainer), folder, kind)


def both(folder: Path, other: Path) -> None:
    """Each kind of training from its beginning, and from the middle on."""
    for kind in KINDS:
        trainer = run(folder / "fresh" / kind, kind)
        write(trainer, seen(trainer), folder / "fresh", kind)
    resumed(folder / "resumed", other)


def flat_group(folder: Path) -> FlowGRPOTrainer:
    """Flow-GRPO on two groups, of which one teaches nothing: its process makes passes for the other."""
    AcceleratorState._reset_state(reset_partial_state=False)
    args = FlowGRPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        output_dir=folder,
        lora=LoraConfig(rank=4),
        plan=PlanConfig(preset="first_steps", num_steps=2, window_size=1),
        num_groups=2,
        group_size=4,
        rollout_batch_size=2,
        train_batch_size=2,
        max_train_steps=2,
        adam_epsilon=1e-6,
        advantage_std="global",
    )
    reward = lambda images, texts, _: images.mean((1, 2, 3)) * torch.tensor(["circle" in text for text in texts])  # noqa: E731
    prompts = [Prompt("a red circle"), Prompt("two stars")]
    trainer = FlowGRPOTrainer(args=args, reward_funcs=reward, train_dataset=prompts)
    trainer.train()
    return trainer


def courses(folder: Path) -> Trainer:
    """ReFL on a base in bfloat16, courses of random lengths and activations computed again."""
    AcceleratorState._reset_state(reset_partial_state=False)
    args = config(folder, "alignprop", num_groups=8, gradient_checkpointing=True, mixed_precision="bf16")
    model = load_model(PIPELINE, dtype=torch.bfloat16, max_sequence_length=16)
    trainer = trainer_of(args, [Prompt("a red circle"), Prompt("two stars")], model=model)
    trainer.train()
    return trainer


def others(folder: Path, _: Path) -> None:
    """The other trainers, whose processes would go ways of their own."""
    for make in (flat_group, courses):
        trainer = make(folder / make.__name__)
        batch = collect(trainer, 1)  # the last iteration's, again
        found = {f"weight/{name}": full_tensor(t) for name, t in indexed(trainer.loop.state.parameters).items()}
        if make is courses:
            assert {p.dtype for p in trainer.model.raw_denoiser.parameters()} == {torch.bfloat16, torch.float32}
            found["courses"] = torch.tensor([len(part.courses[0].moves) for part in batch.parts])
        else:
            minibatches = trainer.algorithm.minibatches(batch, 1)
            found["passes"] = torch.tensor([len(minibatch.micros) for minibatch in minibatches])
        write(trainer, found, folder, make.__name__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"both": both, "resumed": resumed, "others": others}[sys.argv[1]](*map(Path, sys.argv[2:]))
