"""Configuration of ``diffalign score``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffalign.config import Checked, Given, option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig

if TYPE_CHECKING:
    from diffalign.commands.image_sources import Item
    from diffalign.rewards.base import Reward


@dataclass(kw_only=True)
class ScoreConfig(Checked):
    """Configuration of ``diffalign score``."""

    usage: ClassVar[str] = "diffalign score IMAGES ... --rewards NAME [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign score images/ --rewards pickscore --prompt 'a red circle'",
        "diffalign score table.parquet --rewards pickscore,hpsv2.1 --output_dir runs/score",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "images", "rewards", "prompt", "prompts", "output_dir", "batch_size", "reward_options", "list", "serve",
    )  # fmt: skip

    images: tuple[str, ...] = option(
        (), "image files, folders, or .parquet, .arrow, .jsonl, .json or .csv tables", section="data"
    )
    image_root: Path | None = option(
        None, "base folder of relative paths in tables; default: the folder of the table", section="data"
    )
    allow_outside: bool = option(
        False, "read images outside the folder of their table, also through links", section="data"
    )
    prompt: str | None = option(None, "one prompt for all images; '' for rewards that read none", section="data")
    prompts: Path | None = option(
        None,
        "file of one prompt per image, in their order",
        section="data",
    )
    rewards: tuple[str, ...] = option((), "reward names", section="rewards", guard=guard_rewards)
    reward_options: dict[str, float | RewardConfig] = option(
        {},
        "options of rewards, by name: '{pickscore: {options: {path: my/weights, precision: bf16}}}'",
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
    output_dir: Path = option(
        Path("runs/score"), "folder of the scores; an interrupted command resumes there", section="output"
    )
    batch_size: int = option(16, "images of one size per forward pass", section="rewards", ge=1)
    calibrations: Path | None = option(
        None,
        "file for the statistics of these scores, e.g. of the base model's images, for rewards that combine others",
        section="output",
    )
    list: bool = option(False, "print the names of all rewards and exit", section="output")
    serve: int | None = option(
        None,
        "port to serve the rewards at over HTTP, instead of scoring; 0: a free one",
        section="server",
        ge=0,
        le=65535,
        hint="0 takes a free port",
    )
    host: str = option(
        "127.0.0.1", "address to serve at; 0.0.0.0 is open to other machines and needs token_env", section="server"
    )
    time_limit: float = option(300.0, "seconds that a request may wait, and then take", section="server", gt=0)
    token_env: str | None = option(
        None,
        "environment variable with the token that clients must send; required beyond this machine",
        section="server",
        typed_only=True,
    )

    def __post_init__(self, given: Given = None) -> None:  # noqa: RUF033 (of an InitVar)
        """Check every field. ValueError: out of range, or a folder that does not exist."""
        super().__post_init__(given)
        if self.calibrations and not self.calibrations.parent.is_dir():
            raise ValueError(f"calibrations: there is no folder {self.calibrations.parent}; make it first")

    def build_rewards(self) -> dict[str, Reward]:
        """Build ``rewards``. ValueError: no reward is named, or one ranks images within a group."""
        from diffalign.rewards.config import build_rewards

        table = {name: self.reward_options.get(name, 1.0) for name in self.rewards}
        rewards = build_rewards(table, self.allow_reward_code)[0]
        if not rewards:
            raise ValueError("rewards is missing: write --rewards pickscore, or --rewards pickscore,hpsv2.1")
        check_pointwise(rewards)
        return rewards

    def items(self) -> Iterator[Item]:
        """Yield the images with their prompts. ValueError: no image, or a prompt is missing."""
        if not self.images:
            raise ValueError("name pictures: diffalign score FOLDER --rewards pickscore --prompt 'a red circle'")
        from diffalign.commands.image_sources import read, with_prompts
        from diffalign.data.prompts import load_prompts
        from diffalign.structures import Prompt

        items = chain.from_iterable(read(source, self.image_root, self.allow_outside) for source in self.images)
        if self.prompt is not None:
            return with_prompts(items, [Prompt(self.prompt)])
        return with_prompts(items, load_prompts(self.prompts)) if self.prompts else items


def check_pointwise(rewards: Mapping[str, Reward]) -> None:
    """Refuse rewards that rank within a group. ValueError: names them."""
    from diffalign.rewards.base import needs_groups

    if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
        raise ValueError(f"{', '.join(ranks)} rank images within a group of one prompt: score with others")
