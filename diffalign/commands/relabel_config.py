"""Configuration of ``diffalign relabel``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from diffalign.config import option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.data.config import PreferenceDataConfig


@dataclass(frozen=True, kw_only=True)
class RelabelConfig(PreferenceDataConfig):
    """Configuration of ``diffalign relabel``: that of a run's data, and of the rewards that label."""

    usage: ClassVar[str] = "diffalign relabel DATA ... --rewards NAME [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign relabel pairs.parquet --rewards pickscore",
        "diffalign relabel pairs.parquet --rewards pickscore,hpsv2.1 --rule soft --scale 2 --labels soft_two",
    )
    essential: ClassVar[tuple[str, ...]] = ("data", "rewards", "labels", "rule", "scale", "batch_size", "streaming")

    data: tuple[str, ...] = option(
        (), "preference data: files, folders, addresses (s3://...) or hub ids", section="data"
    )
    labels: str = option("ai", "name of the labels, or a .parquet file to write them to", section="output")
    rewards: tuple[str, ...] = option((), "reward names", section="rewards", guard=guard_rewards)
    reward_options: dict[str, float | RewardConfig] = option(
        {},
        "weights of the rewards, or {weight, reward, options}, by name",
        section="rewards",
        guard=guard_rewards,
        infinite=False,
    )
    allow_reward_code: bool = option(
        False,
        "trust reward code and servers that are named; only valid on the command line",
        section="rewards",
        typed_only=True,
    )
    rule: Literal["vote", "soft"] = option(
        "vote", "vote: majority of the rewards; soft: sigmoid(scale * gap)", section="output"
    )
    scale: float = option(
        1.0, "scale of soft labels; the gap is the weighted sum of reward differences", section="output", gt=0
    )
    batch_size: int = option(8, "pairs of one size per forward pass", section="rewards", ge=1)
    streaming: bool = option(False, "stream the rows, without a copy on disk", section="data")

    def judges(self) -> dict[str, float | RewardConfig]:
        """Return the settings of each reward, by name. ValueError: no reward is named."""
        if not any(name.strip() for name in self.rewards):
            raise ValueError("rewards is missing: write --rewards pickscore, or --rewards pickscore,hpsv2.1")
        return {name.strip(): self.reward_options.get(name.strip(), 1.0) for name in self.rewards}

    def settings(self) -> PreferenceDataConfig:
        """Return data settings that keep every pair that can be scored, also ties and unlabelled ones."""
        given = {field.name: getattr(self, field.name) for field in fields(PreferenceDataConfig)}
        return PreferenceDataConfig(**{**given, "labels": None})
