"""Count the memory of a training run besides activations, from the shapes of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffalign.fsdp import units
from diffalign.models.base import DiffusionModel
from diffalign.models.offload import TEXT_ENCODERS, VAE, part_of, tensors_of

ADAMW_MOMENTS = 2  # first and second moments, in the dtype of the weight
AT_ONCE = 2  # FSDP units gathered at once: the running one and the prefetched next

ENCODING = "prompts are encoded"
DRAWING = "images are made"
TRAINING = "it trains"


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes per process by purpose.

    Attributes:
        frozen: Frozen weights and buffers of all components, by dtype.
        trainable: Trainable weights.
        copies: Copies of the trainable weights, such as a frozen reference or an EMA.
        gradients: Gradients of the trainable weights.
        moments: Optimizer moments of the trainable weights.
        pair_latents: Float32 latents of a batch's winners and losers.
        offloaded: Share of ``frozen`` that is offloaded, by part.
        gathered: Weights gathered from shards during a forward pass without gradients.
        gathered_to_train: Weights gathered from shards during training.
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
        """Sum without offloading and gathering."""
        return sum(self.frozen.values()) + sum(
            (self.trainable, self.copies, self.gradients, self.moments, self.pair_latents)
        )

    def phases(self, grad_through: Collection[str] = ()) -> dict[str, int]:
        """Return the bytes of each phase. grad_through: offloaded parts that gradients flow through in training."""
        always = self.total - self.gradients - sum(self.offloaded.values())
        text, vae, with_grad = (
            sum(self.offloaded.get(part, 0) for part in parts) for parts in ([TEXT_ENCODERS], [VAE], grad_through)
        )
        return {
            ENCODING: always + text,
            DRAWING: always + vae + self.gathered,
            TRAINING: always + with_grad + self.gathered_to_train + self.gradients,
        }


@dataclass(frozen=True)
class Spread:
    """FSDP2 sharding of a denoiser over ``processes``. keep: as for ``fsdp.FSDPConfig``."""

    processes: int = 1
    keep: bool = False

    def share(self, size: int) -> int:
        """Return one process's share of ``size``, rounded up."""
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
    """Count the memory needs of training ``model``. Uses shapes only, so a model on the meta device is enough.

    Args:
        model: Made trainable by ``train``.
        pairs: Pairs per batch.
        resolution: (height, width) in pixels; default: the model's.
        copies: Copies of the trainable weights: 1 for the reference of full fine-tuning, 1 for an EMA.
        offload: Offloaded parts.
        spread: Sharding of the denoiser; None if each process holds all of it.
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
    """Return the peak gathered bytes of a forward pass: weights outside FSDP units plus the largest units."""
    *sizes, rest = (sum(map(size_of, parameters)) for _, parameters in units(module))
    return rest + sum(sorted(sizes)[-AT_ONCE:])


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
