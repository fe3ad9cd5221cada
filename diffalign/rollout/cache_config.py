"""Configuration of the cache that rollouts may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar, Literal

from diffalign.config import Checked, Given, option

READ_BY = {"first_block": ("threshold",), "taylorseer": ("interval", "warmup", "order")}


@dataclass(frozen=True)
class RolloutCacheConfig(Checked):
    """A cache of diffusers that reuses activations of earlier sampling steps: faster, and not the model's own samples.

    Training passes and evaluations never use it.
    """

    bare_field: ClassVar[str] = "kind"

    kind: Literal["none", "first_block", "taylorseer"] = option(
        "none", "lossy: first_block (First Block Cache) or taylorseer, where the pipeline supports it"
    )
    threshold: float = option(
        0.05, "first_block: relative change of the first block's output below which the others are skipped", gt=0
    )
    interval: int = option(2, "taylorseer: steps from one full computation to the next", ge=1, le=10_000)
    warmup: int = option(2, "taylorseer: full computations at the start", ge=1, le=10_000)
    order: int = option(1, "taylorseer: order of the extrapolation", ge=0, le=4)
    _: KW_ONLY
    given: InitVar[Given] = None

    def unread(self) -> Mapping[str, str]:
        """Return field -> reason of the fields that this kind does not read."""
        read = READ_BY.get(self.kind, ())
        return {
            name: f"read only with rollout_cache.kind: {kind}"
            for kind, names in READ_BY.items()
            for name in names
            if name not in read
        }
