"""Configuration of ``diffalign relabel``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from diffalign.config import option, split_texts
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.data.config import PreferenceDataConfig


@dataclass(frozen=True, kw_only=True)
class RelabelConfig(PreferenceDataConfig):
    """Fields of ``diffalign relabel``: those of a run's data, and who judges."""

    data: tuple[str, ...] = option((), "files, folders or hub ids of preference data")
    labels: str = option("ai", "what the labels are called, or a .parquet file for them")
    rewards: tuple[str, ...] = option((), "a reward, or several in a list or with commas between", guard=guard_rewards)
    reward_options: dict[str, float | RewardConfig] = option(
        {}, "weights, and how to make the rewards, by name", guard=guard_rewards
    )
    allow_reward_code: bool = option(
        False, "trust files with rewards that are code or servers; counts only where it is typed", typed_only=True
    )
    rule: Literal["vote", "soft"] = option("vote", "vote: the majority of the rewards; soft: sigmoid(scale * gap)")
    scale: float = option(1.0, "of soft labels; the gap is the weighted sum of the rewards' differences", gt=0)
    batch_size: int = option(8, "pairs of one size that are scored at once", ge=1)
    streaming: bool = option(False, "one row after the other, without a copy on disk")

    def __post_init__(self) -> None:
        """Accept a text where several go. ValueError: as for the settings of the data."""
        super().__post_init__()
        split_texts(self)

    def judges(self) -> dict[str, float | RewardConfig]:
        """Each reward and its settings. ValueError: none."""
        if not any(name.strip() for name in self.rewards):
            raise ValueError("rewards is missing: write --rewards pickscore, or --rewards pickscore,hpsv2.1")
        return {name.strip(): self.reward_options.get(name.strip(), 1.0) for name in self.rewards}

    def settings(self) -> PreferenceDataConfig:
        """How the data are read: with every pair that can be judged, ties and unlabelled ones too."""
        given = {field.name: getattr(self, field.name) for field in fields(PreferenceDataConfig)}
        return PreferenceDataConfig(**{**given, "labels": None})
