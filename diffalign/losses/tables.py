"""Tables of all losses in Markdown, which the README.md beside this file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from diffalign.losses.registry import (
    FORWARD_OBJECTIVES,
    POLICY_OBJECTIVES,
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    ForwardObjective,
)

README = Path(__file__).with_name("README.md")


def preference_table() -> str:
    """List the preference losses: pairs first, each group by name."""
    losses = sorted(PREFERENCE_LOSSES.items(), key=lambda item: (not item[1].paired, item[0]))
    rows = (
        (
            f"`{name}`",
            loss.idea,
            _paper(loss.source),
            "pair" if loss.paired else "single",
            "" if loss.beta is None else f"{loss.beta:g}",
            "yes" if loss.reference else "no",
            ", ".join(f"`{option}`" for option in loss.options if option not in _provided(loss.context)),
        )
        for name, loss in losses
    )
    return _table(("loss", "idea", "paper", "learns from", "beta", "reference", "options"), rows)


def reward_table() -> str:
    """List the reward losses by name."""
    rows = (
        (f"`{name}`", loss.idea, _paper(loss.source), ", ".join(f"`{option}`" for option in loss.options))
        for name, loss in sorted(REWARD_LOSSES.items())
    )
    return _table(("loss", "idea", "paper", "options"), rows)


def policy_table() -> str:
    """List the policy objectives by name."""
    rows = (
        (f"`{name}`", loss.idea, _paper(loss.source), "yes" if loss.means else "no")
        for name, loss in sorted(POLICY_OBJECTIVES.items())
    )
    return _table(("objective", "idea", "paper", "stores means"), rows)


def forward_table() -> str:
    """List the forward objectives by name."""
    rows = (
        (
            f"`{name}`",
            loss.idea,
            _paper(loss.source),
            ", ".join(_outputs(loss)),
            "yes" if loss.wants("statistic", loss.resolve({})) else "no",
            ", ".join(f"`{option}` {value:g}" for option, value in loss.resolve({}).items()),
        )
        for name, loss in sorted(FORWARD_OBJECTIVES.items())
    )
    return _table(("objective", "idea", "paper", "compares with", "group means", "options"), rows)


def _outputs(loss: ForwardObjective) -> list[str]:
    options = loss.resolve({})
    old, reference = (loss.wants(n, options) or loss.wants(f"statistic_{n}", options) for n in ("old", "reference"))
    found = {"old": old, "reference": reference}
    return [name for name, needed in found.items() if needed]


TABLES = {
    "preference": preference_table,
    "reward": reward_table,
    "policy": policy_table,
    "forward": forward_table,
}


def updated(text: str) -> str:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` in a README by the current tables."""
    for name, table in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table()}\n{end}{rest.partition(end)[2]}"
    return text


def _provided(context: object) -> tuple[str, ...]:
    return getattr(context, "provides", ())


def _paper(source: str) -> str:
    return f"[{source}](https://arxiv.org/abs/{source})" if re.fullmatch(r"\d{4}\.\d{5}", source) else source


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))
