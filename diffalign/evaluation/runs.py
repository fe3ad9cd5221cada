"""Read the config of a run folder as untrusted data.

Accepted from ``config.yaml``: the base model, numbers, registered rewards, and files inside the run folder. Everything
else (rewards that are code, servers, other weights, files elsewhere) must be typed by the user, or allowed by
``--allow_reward_code`` for trusted runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config import from_dict, load_yaml
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.schema import Place
from diffalign.config.sections import JUDGE
from diffalign.rewards.base import names
from diffalign.rewards.config import RewardConfig

CONFIG = "config.yaml"
HELD_OUT = "eval_prompts.jsonl"  # copy of the held-out prompts in the run folder
# reward options whose string value selects a mode, not a file, repository or server
CHOICES = frozenset({"answer", "precision", "quantize", "rater", "reward", "rule", "scale", "verdict"})
TRUST = "if the run is yours, or you trust it, type --allow_reward_code"


@dataclass
class _Rewards:
    """The rewards section of a run config."""

    rewards: dict[str, float | RewardConfig]


@dataclass(frozen=True)
class RunConfig:
    """A run folder and its config.

    Attributes:
        folder: The run folder.
        values: Content of ``config.yaml``.
        trusted: Whether code, servers and files outside the folder may be used.
    """

    folder: Path
    values: Mapping[str, Any]
    trusted: bool = False

    @property
    def file(self) -> Path:
        """Path of ``config.yaml``."""
        return self.folder / CONFIG

    def held_out(self) -> Path | None:
        """Return the file of held-out prompts: the copy in the run folder, else ``eval_prompts``; None if unset.

        Raises ValueError for a file outside an untrusted run.
        """
        if self.contains(self.folder / HELD_OUT):
            return self.folder / HELD_OUT
        if not (named := self.values.get("eval_prompts")):
            return None
        if self.trusted or self.contains(named):
            return Path(str(named))
        raise ValueError(
            f"{self.file}: eval_prompts: {str(named)[:200]!r} is not a file inside the run, and is not read: write "
            f"--prompts FILE; {TRUST}"
        )

    def cache_dir(self) -> Path | None:
        """Return the folder of prompt embeddings; None if unset, or outside an untrusted run."""
        named = self.values.get("cache_dir")
        return Path(str(named)) if named and (self.trusted or self.contains(named)) else None

    def reward_names(self) -> tuple[str, ...]:
        """Return the names of ``eval_rewards``, else of ``rewards``."""
        found = self.values.get("eval_rewards") or self.values.get("rewards") or ()
        if not isinstance(found, (list, tuple, Mapping)) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"{self.file}: eval_rewards must be names of rewards; write --rewards NAME")
        return tuple(found)

    def reward_options(self, wanted: tuple[str, ...], typed: bool) -> dict[str, float | RewardConfig]:
        """Return the run's options of the ``wanted`` rewards.

        Args:
            wanted: Reward names.
            typed: Whether the user typed these names.

        Raises:
            ValueError: An untrusted run asks for code, a server, or a file outside its folder.
        """
        rewards = self.values.get("rewards") or {}
        table = {name: rewards[name] for name in wanted if isinstance(rewards, Mapping) and name in rewards}
        guard_rewards(table, Place(str(self.file), _Rewards, "rewards"), self.trusted)
        if not self.trusted:
            for name in table if typed else wanted:
                self._check_reward(name, table.get(name))
        return from_dict(_Rewards, {"rewards": table}, str(self.file)).rewards

    def contains(self, path: object) -> bool:
        """Return whether ``path`` is a file or folder inside the run, after resolving links."""
        try:
            found = Path(str(path)).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        return found.is_relative_to(self.folder.resolve()) and (found.is_dir() or found.is_file())

    def _check_reward(self, name: str, entry: Any) -> None:
        settings = entry if isinstance(entry, Mapping) else {}
        if settings.get("path") is not None:  # short for a judge at that path
            given = settings.get("options")
            options = {**(given if isinstance(given, Mapping) else {}), "path": settings["path"]}
            settings = {"reward": settings.get("reward") or JUDGE, "options": options}
        spec = settings.get("reward") or name
        if spec not in names():
            raise ValueError(
                f"{self.file}: reward {str(spec)[:200]!r} is not registered here, and is not run: write --rewards NAME "
                f"for one that is; {TRUST}"
            )
        for path, value in _texts(settings.get("options")):
            if path[-1] not in CHOICES and not self.contains(value):
                where = ".".join(("rewards", name, "options", *path[1:]))
                raise ValueError(
                    f"{self.file}: {where}: {value[:200]!r} is not a file inside the run, and is not used: write "
                    f"--rewards and --reward_options; {TRUST}"
                )


def _texts(value: Any, path: tuple[str, ...] = ("",)) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key path, value) of every string in the options of a reward."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _texts(entry, (*path, str(name)))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry, path)


def find_run(path: Path | None, trusted: bool) -> RunConfig | None:
    """Load the config of the run that contains ``path``: the folder, its parent or grandparent; None without one."""
    if path is None:
        return None
    folders = [path, *path.resolve().parents[:2]]
    folder = next((one for one in folders if (one / CONFIG).is_file()), None)
    return None if folder is None else RunConfig(folder, load_yaml(folder / CONFIG), trusted)
