"""Configuration of step-wise preference: a method and overrides."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from diffalign.config import Checked, option


@dataclass(frozen=True)
class Siblings:
    """A method of step-wise preference.

    Attributes:
        whole_paths: Whether pairs are two whole paths, labelled by their images, instead of children of one state.
        first_step: First step that is compared. At earlier ones, predicted clean images say little.
        survivor: The child that the path goes on from: "random", uniformly, or "winner", the best.
        nudge: Step size, in squared latent units per unit of reward, by which a winner ascends the reward of its
            predicted clean image before it is compared; 0 for none.
    """

    whole_paths: bool = False
    first_step: int = 0
    survivor: str = "random"
    nudge: float = 0.0


SIBLINGS: dict[str, Siblings] = {
    # arXiv 2406.04314 and its released code, configs/basic_config.py.
    "spo": Siblings(first_step=4),
    # arXiv 2502.01667. No code is published: first step and nudge are ours.
    "tailorpo": Siblings(survivor="winner"),
    "tailorpo_g": Siblings(survivor="winner", nudge=0.1),
    # arXiv 2311.13231.
    "d3po": Siblings(whole_paths=True),
}


@dataclass(frozen=True)
class SiblingsConfig(Checked):
    """A method of ``SIBLINGS`` and overrides; None keeps the method's own value."""

    bare_field: ClassVar[str] = "preset"

    preset: str = option("spo", "spo, tailorpo, tailorpo_g or d3po (whole paths, labelled by their images)")
    first_step: int | None = option(None, "first sampling step that is compared", ge=0, le=10_000)
    survivor: str | None = option(None, "child that a path goes on from: random, or winner (the best)")
    nudge: float | None = option(
        None,
        "step size of a winner's ascent on the reward before it is compared; 0: none, and rewards need no gradient",
        ge=0,
        infinite=False,
    )

    def resolve(self) -> Siblings:
        """Merge the overrides into the method. ValueError: an unknown name, or an option that it does not read."""
        if self.preset not in SIBLINGS:
            raise ValueError(f"siblings.preset {self.preset!r} is unknown: use one of {', '.join(SIBLINGS)}")
        method = SIBLINGS[self.preset]
        changes = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        changes = {name: value for name, value in changes.items() if value is not None}
        if method.whole_paths and changes:
            raise ValueError(
                f"siblings.preset {self.preset!r} compares whole paths, and does not read {', '.join(changes)}: leave "
                "it out, or choose spo, tailorpo or tailorpo_g"
            )
        if changes.get("survivor", "random") not in ("random", "winner"):
            raise ValueError(f"siblings.survivor must be random or winner, got {self.survivor!r}")
        return replace(method, **changes)
