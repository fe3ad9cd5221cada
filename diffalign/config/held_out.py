"""The judges of a run that nothing trains on: a table of rewards, or the word ``panel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.config.sections import RewardConfig, RewardTable

WORD = "panel"
# The rewards that preference-tuning papers print together; about 10 GB in float32.
PANEL = ("pickscore", "hpsv2.1", "image_reward", "aesthetic", "clipscore")


def spec_of(name: str, entry: Any) -> str:
    """Return the registered name or code of a reward in a table."""
    return entry.reward or name if isinstance(entry, RewardConfig) else name


def held_out_table(held_out: RewardTable, trained: Mapping[str, Any]) -> dict[str, float | RewardConfig]:
    """Return the judges, ``panel`` replaced by those of ``PANEL`` that the run does not train on.

    Args:
        held_out: As configured; entries beside ``panel`` add judges, or give options of its own.
        trained: The rewards of the run, by name.

    Raises:
        ValueError: A judge is trained on, or ``panel`` is left with none.
    """
    specs = {spec_of(name, entry) for name, entry in trained.items()}
    own = {name: entry for name, entry in held_out.items() if name != WORD}
    if refused := [name for name, entry in own.items() if name in trained or spec_of(name, entry) in specs]:
        raise ValueError(
            f"held_out: {', '.join(refused)}: the run trains on it, so it cannot tell whether rewards are hacked; "
            f"leave it out, or write held_out: {WORD}"
        )
    if WORD not in held_out:
        return own
    panel: dict[str, float | RewardConfig] = {name: 1.0 for name in PANEL if name not in specs | set(trained)}
    if not panel | own:
        raise ValueError(f"held_out: the run trains on all of the {WORD} ({', '.join(PANEL)}); name another judge")
    return panel | own
