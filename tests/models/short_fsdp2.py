"""A LoRA sharded by torch's ``fully_shard`` over the processes of a launcher, for ``test_fsdp2``.

Writes per process what it saw; the main one the LoRA, gathered, and that of a training without shards.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from diffalign.models import LoraConfig, load_model
from diffalign.models.sharding import is_sharded, trained_weights
from tests.conftest import PIPELINE

IMAGES, STEPS = 4, 2


def build():
    model = load_model(PIPELINE, max_sequence_length=16)
    model.train(LoraConfig(rank=4))
    x = torch.randn(IMAGES, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model, x, model.encode(["a red circle", "a blue square", "two stars", "a green triangle"])


def train(model, x, conditioning):
    optimizer = torch.optim.AdamW([p for p in model.raw_denoiser.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        output = model.predict(x, model.levels(4)[1], conditioning)
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mesh = distributed.init_device_mesh("cpu", (world,))
    model, x, conditioning = build()
    before = {name: p.detach().clone() for name, p in model.raw_denoiser.named_parameters() if p.requires_grad}
    for block in model.raw_denoiser.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model.raw_denoiser, mesh=mesh)
    trained = {name: p for name, p in model.raw_denoiser.named_parameters() if p.requires_grad}
    assert isinstance(model.raw_denoiser, FSDPModule)
    assert is_sharded(model.raw_denoiser)
    assert all(isinstance(p, DTensor) for p in model.raw_denoiser.parameters())
    gathered = trained_weights(model.raw_denoiser)
    found = {f"before/{name}": tensor for name, tensor in gathered.items()}
    own = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    train(model, x[own], conditioning[own])
    gathered = trained_weights(model.raw_denoiser)
    found |= {f"after/{name}": tensor for name, tensor in gathered.items()}
    found["world"] = torch.tensor(world)
    found["local"] = torch.tensor(sum(p.to_local().numel() for p in trained.values()))
    save_file({name: t.contiguous().clone() for name, t in found.items()}, folder / f"{rank}.safetensors")
    (folder / f"lora-{rank}").mkdir()
    if rank == 0:
        whole, x, conditioning = build()
        train(whole, x, conditioning)
        after = {n: p.detach().clone() for n, p in whole.raw_denoiser.named_parameters() if p.requires_grad}
        tensors = {f"before/{n}": t for n, t in before.items()} | {f"after/{n}": t for n, t in after.items()}
        save_file(tensors, folder / "whole.safetensors")
        whole.save(folder / "lora-whole")
    model.save(folder / f"lora-{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
