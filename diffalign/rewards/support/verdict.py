"""What the rewards of the embedded world share: one field of a verifier's verdict is the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class VerdictReward:
    """A reward whose score is one field of a verdict.

    Args:
        name: under which scores are stored.
        verdict: one of ``verdicts``.
        differentiable: False.
        range: lowest and highest score.
    """

    verdicts: ClassVar[tuple[str, ...]] = ()

    name: str
    verdict: str
    differentiable: bool = False
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the verdict."""
        if self.verdict not in self.verdicts:
            raise ValueError(
                f"reward {self.name!r}: verdict must be one of {', '.join(self.verdicts)}, got {self.verdict!r}"
            )
