"""Shard weights over all processes by torch's own FSDP2, for a trainable set that is larger than one device.

A module is sharded before anything else holds its parameters, so that the optimizer, the EMA and the weight sets are
made of shards and nothing is replaced later. Frozen weights in bfloat16 beside a LoRA in float32 are fine: only what
trains must be of one dtype. Every forward and backward pass of a sharded module is collective: each process must make
equally many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class FSDPConfig:
    """Settings of FSDP2.

    device: of the shards. keep: whether parameters stay gathered between forward and backward, which is ZeRO-2 of
        arXiv 1910.02054; else they are gathered again, ZeRO-3.
    """

    device: torch.device
    keep: bool = False


def shard(module: nn.Module, to: FSDPConfig) -> None:
    """Shard a diffusers model over all processes, unit by unit. Each process must have the same weights."""
    mesh = init_device_mesh(to.device.type, (get_world_size(),))
    for part, _ in units(module):
        # The outermost part too: what it kept after a pass without gradients would be old after the next update.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if to.keep:
        module.register_forward_pre_hook(_keep_if_recorded)


def units(module: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """List the units that are gathered one after another, with their parameters: inner blocks first, ``module`` last.

    Blocks are those of ``_no_split_modules``, which diffusers declares.
    """
    names = getattr(module, "_no_split_modules", None) or ()
    blocks = [part for part in module.modules() if type(part).__name__ in names and part is not module]
    found, seen = [], set[int]()
    for part in [*reversed(blocks), module]:
        found.append((part, [p for p in part.parameters() if id(p) not in seen]))
        seen |= {id(p) for p in part.parameters()}
    return found


def _keep_if_recorded(module: nn.Module, _: Any) -> None:
    if isinstance(module, FSDPModule):
        module.set_reshard_after_forward(not torch.is_grad_enabled())


def free(module: nn.Module) -> None:
    """Free the gathered parameters of a module, which are stale once its shards change."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Return whether ``shard`` was applied to the module."""
    return isinstance(module, FSDPModule)


def plain_class(module: nn.Module) -> type[Any]:
    """Return the class that a module had before it was sharded."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def full_tensor(tensor: Tensor, keep: bool = True) -> Tensor:
    """Gather a sharded tensor on the CPU; return others as they are. Every process must call it.

    keep: False returns the sharded tensor instead, for processes that take part in the gather and need no result.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        found = tensor.full_tensor()
    return found.cpu() if keep else tensor


def gathered(module: nn.Module, *, trained_only: bool, keep: bool) -> dict[str, Tensor]:
    """Gather the weights of a sharded module by name with ``full_tensor``; every process must call it."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    chosen = trained if trained_only else module.state_dict()
    return {name: full_tensor(tensor, keep) for name, tensor in chosen.items()}


def unsharded(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build an unsharded diffusers model of the class and configuration of ``module``, with these weights."""
    with torch.device("meta"):
        found = plain_class(module).from_config(module.config)
    found.load_state_dict(weights, assign=True)
    return found


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard ``tensor``, which every process has in full, as ``other`` is sharded, if it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, in the same memory, without gradients."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
