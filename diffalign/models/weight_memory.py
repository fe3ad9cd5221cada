"""What a training holds in memory besides its activations, counted from the weights themselves before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffalign.fsdp import units
from diffalign.models.base import DiffusionModel
from diffalign.models.offload import TEXT_ENCODERS, VAE, part_of, tensors_of

ADAMW_MOMENTS = 2  # of the gradient and of its square, in the dtype of the weight
AT_ONCE = 2  # units of a sharded module that are whole at once: the one that runs, and the next

ENCODING = "prompts are encoded"
DRAWING = "images are made"
TRAINING = "it trains"


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes of a process by purpose.

    frozen: weights and buffers that do not train, of every part of the pipeline, by dtype. trainable: weights that
    train. copies: of those, such as a frozen reference or an EMA. gradients, moments: of the trainable weights.
    pair_latents: winners and losers of one batch, float32. offloaded: of ``frozen``, the parts that leave the device.
    gathered: weights that are put together from shards while the denoiser runs, and gathered_to_train, while it trains.
    """

    frozen: Mapping[torch.dtype, int]
    trainable: int
    copies: int
    gradients: int
    moments: int
    pair_latents: int
    offloaded: Mapping[str, int] = field(default_factory=dict)
    gathered: int = 0
    gathered_to_train: int = 0

    @property
    def total(self) -> int:
        """All of it, if nothing left and nothing were in shards."""
        return sum(self.frozen.values()) + sum(
            (self.trainable, self.copies, self.gradients, self.moments, self.pair_latents)
        )

    def phases(self, grad_through: Collection[str] = ()) -> dict[str, int]:
        """Bytes at a time, by what is done. grad_through: parts that gradients come back through."""
        always = self.total - self.gradients - sum(self.offloaded.values())
        text, vae, taught = (
            sum(self.offloaded.get(part, 0) for part in parts) for parts in ([TEXT_ENCODERS], [VAE], grad_through)
        )
        return {
            ENCODING: always + text,
            DRAWING: always + vae + self.gathered,
            TRAINING: always + taught + self.gathered_to_train + self.gradients,
        }


@dataclass(frozen=True)
class Spread:
    """Over how many processes a denoiser is spread (FSDP2). keep: as for ``sharding.FSDPConfig``."""

    processes: int = 1
    keep: bool = False

    def share(self, size: int) -> int:
        """That of a process, rounded up."""
        return -(-size // self.processes)


def memory_needs(
    model: DiffusionModel,
    pairs: int,
    resolution: tuple[int, int] | None = None,
    copies: int = 0,
    *,
    offload: Collection[str] = (),
    spread: Spread | None = None,
) -> MemoryNeeds:
    """The needs of training ``model``, on which ``train`` has been called, on batches of so many pairs.

    Counts shapes only, so a model on the meta device will do. resolution: (height, width) in pixels, default the
    model's. copies: kept of the trainable weights: 1 for the reference of full fine-tuning, 1 for an EMA. offload:
    parts that leave the device. spread: None where each process has all of the denoiser.
    """
    denoiser, pipeline, spread = model.raw_denoiser, model.pipeline, spread or Spread()
    chosen = {id(p) for p in denoiser.parameters() if p.requires_grad}
    shared = {id(p) for p in denoiser.parameters()}
    frozen: Counter[torch.dtype] = Counter()
    for tensor in tensors_of([part for part in pipeline.components.values() if isinstance(part, nn.Module)]):
        if id(tensor) not in chosen:
            frozen[tensor.dtype] += spread.share(size_of(tensor)) if id(tensor) in shared else size_of(tensor)
    weights = sum(spread.share(size_of(p)) for p in denoiser.parameters() if p.requires_grad)
    latents = 2 * pairs * torch.Size(model.latent_shape(resolution)).numel() * torch.float32.itemsize
    gathered = gathered_bytes(denoiser) if spread.processes > 1 else 0
    return MemoryNeeds(
        dict(frozen),
        weights,
        copies * weights,
        weights,
        ADAMW_MOMENTS * weights,
        latents,
        {part: sum(map(size_of, tensors_of(part_of(pipeline, part).values()))) for part in offload},
        gathered,
        sum(map(size_of, denoiser.parameters())) if gathered and spread.keep else gathered,
    )


def gathered_bytes(module: nn.Module) -> int:
    """What a pass without gradients puts together at once: what is in no unit, and the largest units."""
    *sizes, rest = (sum(map(size_of, parameters)) for _, parameters in units(module))
    return rest + sum(sorted(sizes)[-AT_ONCE:])


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
