"""Weights in shards over all processes, by torch's own FSDP2: a trainable set that is larger than one device.

A module is sharded before anything else holds its parameters, so that the optimizer, the EMA and the weight sets are
made of shards and nothing is replaced later. Frozen weights in bfloat16 beside a LoRA in float32 are fine: only what
trains must be of one dtype. Every call of a sharded module, forwards and backwards, asks all processes: each must make
as many as the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class FSDPConfig:
    """Where a module goes in shards. keep: whether its weights stay whole from a pass that records gradients to the
    backward pass, which then need not gather them again: ZeRO-2 of arXiv 1910.02054; else ZeRO-3.
    """

    device: torch.device
    keep: bool = False


def shard(module: nn.Module, to: FSDPConfig) -> None:
    """Spreads a diffusers model over all processes, unit by unit. Each process must have the same weights."""
    mesh = init_device_mesh(to.device.type, (get_world_size(),))
    for part, _ in units(module):
        # The outermost part too: what it kept after a pass without gradients would be old after the next update.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if to.keep:
        module.register_forward_pre_hook(_keep_if_recorded)


def units(module: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """What is gathered one after another, with its parameters: blocks, inner ones first, then the rest as ``module``.

    Blocks are what diffusers names as not to be split.
    """
    names = getattr(module, "_no_split_modules", None) or ()
    blocks = [part for part in module.modules() if type(part).__name__ in names and part is not module]
    found, seen = [], set[int]()
    for part in [*reversed(blocks), module]:
        found.append((part, [p for p in part.parameters() if id(p) not in seen]))
        seen |= {id(p) for p in part.parameters()}
    return found


def _keep_if_recorded(module: FSDPModule, _: Any) -> None:
    module.set_reshard_after_forward(not torch.is_grad_enabled())


def free(module: nn.Module) -> None:
    """Lets go of what is gathered of a module, which is old once its shards change."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` has had it."""
    return isinstance(module, FSDPModule)


def plain_class(module: nn.Module) -> type[Any]:
    """The class that a module had before it was sharded."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """A tensor put together, on the CPU if it was in shards; every process must ask. keep: False leaves it as it was.

    One that is whole is given back itself.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    found = tensor.detach().full_tensor()
    return found.cpu() if keep else tensor


def gathered(module: nn.Module, *, trained_only: bool, keep: bool) -> dict[str, Tensor]:
    """The weights of a sharded module by name, put together as ``whole`` does; every process must ask."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    chosen = trained if trained_only else module.state_dict()
    return {name: whole(tensor, keep) for name, tensor in chosen.items()}


def unsharded(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A diffusers model as ``module`` was before it was sharded, with these weights."""
    with torch.device("meta"):
        found = plain_class(module).from_config(module.config)
    found.load_state_dict(weights, assign=True)
    return found


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, which every process has whole, in shards if ``other`` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory, without gradients."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
