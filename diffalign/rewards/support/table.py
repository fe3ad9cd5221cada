"""Format the registered rewards as a Markdown table, from their cards."""

from __future__ import annotations

import math
from collections.abc import Iterable

from diffalign.rewards.base import registered

HEADER = (
    "| name | measures | range | scale | gradient | weights | M parameters | licence | needs | source |",
    "| --- | --- | --- | ---: | --- | --- | ---: | --- | --- | --- |",
)


def reward_table(names: Iterable[str]) -> str:
    """Build a table with one row per reward: its card, and the range and gradient of its default settings."""
    return "\n".join((*HEADER, *(_row(name) for name in names)))


def _row(name: str) -> str:
    card = registered(name).facts
    size = f"{card.millions:,.0f}" if card.millions else ""
    needs = f"diffalign[{card.extra}]" if card.extra else ""
    known = (card.weights, size, card.licence, needs, card.source)
    cells = (f"`{name}`", card.measures, *_behaviour(name), *(cell or "–" for cell in known))
    return f"| {' | '.join(cells)} |"


def _behaviour(name: str) -> tuple[str, str, str]:
    """Range, scale and gradient; unknown for a reward that has required options, such as the address of a server."""
    scale = f"{registered(name).facts.scale:g}"
    try:
        reward = registered(name).make()
    except ValueError:
        return "its own", scale, "–"
    low, high = reward.range
    lower = "(−∞" if math.isinf(low) else f"[{low:g}"
    upper = "∞)" if math.isinf(high) else f"{high:g}]"
    return f"{lower}, {upper}", scale, "yes" if reward.differentiable else "no"
