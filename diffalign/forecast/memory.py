"""The memory of a run, phase by phase, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffalign import device
from diffalign.models import DiffusionModel
from diffalign.models.quantise import saved_bytes
from diffalign.models.weight_memory import MemoryNeeds, Spread, memory_needs
from diffalign.trainers.cost import Cost, Share

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """Bytes of a process, less activations and rewards.

    needs: by purpose. stored: what an iteration keeps. saved: by quantisation. phases: at a time, by what is done.
    """

    needs: MemoryNeeds
    stored: int
    saved: int
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most at a time."""
        return max(self.phases.values())


def memory_of(model: DiffusionModel, cost: Cost, args: Any, share: Share, spread: Spread | None = None) -> Forecast:
    """What a process will hold. model: made trainable, on meta or not. spread: None where nothing is in shards."""
    needs = memory_needs(model, pairs=0, copies=cost.copies(args), offload=args.offload, spread=spread)
    if args.optimizer == "adamw_8bit":
        needs = replace(needs, moments=needs.moments // torch.float32.itemsize)
    saved, stored = saved_bytes(model.raw_denoiser, args.quantise), cost.stored(args, model.latent_shape(), share)
    phases = {name: size + stored - saved for name, size in needs.phases(cost.grad_through).items()}
    return Forecast(needs, stored, saved, phases)


def memory_lines(found: Forecast, free: int, place: str) -> list[str]:
    """A line per purpose, and one per phase."""
    needs = found.needs
    rows = {
        **{f"frozen, {str(dtype).removeprefix('torch.')}": size for dtype, size in needs.frozen.items()},
        "trained": needs.trainable,
        "gradients": needs.gradients,
        "optimizer": needs.moments,
        "copies of what is trained": needs.copies,
        "stored latents": found.stored,
        "saved by quantisation": -found.saved,
        **{f"of these, {part} leave": size for part, size in needs.offloaded.items()},
        "gathered from shards": needs.gathered_to_train,
        **{f"in all, while {phase}": size for phase, size in found.phases.items()},
    }
    lines = [f"{name:35} {size / GIB:8.3f} GiB" for name, size in rows.items() if size]
    return [*lines, f"free: {free / GIB:.1f} GiB, {place}; activations and rewards come on top"]


def free_memory() -> tuple[int, str]:
    """(bytes, of what) where the model would go."""
    return device.free_memory(device.default_device())
