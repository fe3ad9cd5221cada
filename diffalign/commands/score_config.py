"""Configuration of ``diffalign score``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffalign.config import option, split_texts
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig

if TYPE_CHECKING:
    from diffalign.commands.image_sources import Item
    from diffalign.rewards.base import Reward


@dataclass(kw_only=True)
class ScoreConfig:
    """Fields of ``diffalign score``."""

    numbers_checked: ClassVar[bool] = True

    images: tuple[str, ...] = option((), "picture files, folders, .parquet, .arrow, .jsonl, .json or .csv files")
    image_root: Path | None = option(None, "where relative paths of tables start; default: the folder of the table")
    allow_outside: bool = option(False, "read pictures that lie outside the folder of their table, also through links")
    prompt: str | None = option(None, "one prompt for all pictures; '' for rewards that read none")
    prompts: Path | None = option(None, ".txt or .jsonl, a prompt per picture in their order")
    rewards: tuple[str, ...] = option((), "a reward, or several in a list or with commas between", guard=guard_rewards)
    reward_options: dict[str, float | RewardConfig] = option(
        {},
        "how to make those that need options: '{pickscore: {options: {path: my/weights, precision: bf16}}}'",
        guard=guard_rewards,
    )
    allow_reward_code: bool = option(
        False, "trust files with rewards that are code or servers; counts only where it is typed", typed_only=True
    )
    output_dir: Path = option(Path("runs/score"), "where scores go; an interrupted one goes on")
    batch_size: int = option(16, "pictures of one size that are scored at once")
    calibrations: Path | None = option(
        None, "where to write what these pictures score, e.g. the base model's, for a reward that combines others"
    )
    list: bool = option(False, "print the rewards that can be named, and do nothing else")
    serve: int | None = option(None, "offer the rewards over HTTP at this port, instead of scoring")
    host: str = option("127.0.0.1", "where to offer them; 0.0.0.0: to other machines too, with token_env")
    time_limit: float = option(300.0, "seconds that a request to the server may take, and wait before that")
    token_env: str | None = option(
        None, "environment variable with the token that clients must send; needed beyond this machine", typed_only=True
    )

    def __post_init__(self) -> None:
        """Check numbers and places. ValueError: out of range, or a place that cannot be written to."""
        split_texts(self)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; write 1 or more")
        if not self.time_limit > 0:
            raise ValueError(f"time_limit is {self.time_limit}; write more than 0")
        if self.serve is not None and not 0 <= self.serve < 1 << 16:
            raise ValueError(f"serve: there is no port {self.serve}; write 1 to 65535, or 0 for a free one")
        if self.calibrations and not self.calibrations.parent.is_dir():
            raise ValueError(f"calibrations: there is no folder {self.calibrations.parent}; make it first")

    def build_rewards(self) -> dict[str, Reward]:
        """Those of ``rewards``. ValueError: none, or one that judges within a group."""
        from diffalign.rewards.config import build_rewards

        table = {name: self.reward_options.get(name, 1.0) for name in self.rewards}
        rewards = build_rewards(table, self.allow_reward_code)[0]
        if not rewards:
            raise ValueError("rewards is missing: write --rewards pickscore, or --rewards pickscore,hpsv2.1")
        check_pointwise(rewards)
        return rewards

    def items(self) -> Iterator[Item]:
        """The pictures and their prompts. ValueError: nothing to score, or a prompt is missing."""
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
