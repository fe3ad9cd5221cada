"""Settings for sampling evaluation images."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.structures import Resolution


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings shared by all models of an evaluation.

    The noise of an image is keyed by seed, index of the prompt in its file, and sample index. ``base_share``, in
    [0, 1), is the fraction of steps, the first ones, that run with the base weights (ImageReFL, arXiv 2505.22569).
    """

    model: str
    max_sequence_length: int | None
    resolution: Resolution
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
        """Number of steps with the base weights."""
        return round(self.base_share * self.num_steps)


def spread_evenly(count: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` of ``count`` indices, evenly spaced, including the first and the last."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: leave it out for all prompts")
    return sorted({round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)})
