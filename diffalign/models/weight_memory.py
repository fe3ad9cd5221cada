"""Count the bytes of weights, whole and in shards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from diffalign.fsdp import units

ADAMW_MOMENTS = 2  # first and second moments, in the dtype of the weight
AT_ONCE = 2  # FSDP units gathered at once: the running one and the prefetched next


@dataclass(frozen=True)
class Spread:
    """FSDP2 sharding of a denoiser over ``processes``. keep: as for ``fsdp.FSDPConfig``."""

    processes: int = 1
    keep: bool = False

    def share(self, size: int) -> int:
        """Return one process's share of ``size``, rounded up."""
        return -(-size // self.processes)


def gathered_bytes(module: nn.Module) -> int:
    """Return the peak gathered bytes of a forward pass: weights outside FSDP units plus the largest units."""
    *sizes, rest = (sum(map(size_of, parameters)) for _, parameters in units(module))
    return rest + sum(sorted(sizes)[-AT_ONCE:])


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
