"""How the images of an evaluation are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How every model draws. Noise is addressed by seed, the prompt's place in the file and the sample's number.

    base_share: of the steps, the first ones, that the base makes for every model (arXiv 2505.22569), in [0, 1).
    """

    model: str
    max_sequence_length: int | None
    resolution: int | None
    num_steps: int
    schedule: str
    guidance_scale: float
    images_per_prompt: int
    seed: int
    embedded_guidance: float | None = None
    revision: str | None = None
    base_share: float = 0.0

    @property
    def base_steps(self) -> int:
        """Those of ``base_share``."""
        return round(self.base_share * self.num_steps)


def spread_evenly(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spread, the first and the last among them."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: leave it out for all prompts")
    return sorted({round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)})
