"""Findings of ``diffalign doctor`` and their text."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]
MARKS: dict[Status, str] = {"ok": "ok", "note": "--", "problem": "!!"}


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: What was checked.
        status: "ok", "note" (optional parts), or "problem" (training would fail or lose data).
        text: What was found.
        fix: What to do about a problem.
    """

    name: str
    status: Status
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{MARKS[self.status]:2} {self.name:27} {self.text}"


Check = Callable[[], Iterable[Finding]]


def run_check(title: str, check: Check) -> Iterator[Finding]:
    """Yield the findings of a check; an exception becomes a finding too."""
    start = time.perf_counter()
    try:
        found = iter(check())
        while (finding := _next_quietly(found)) is not None:
            yield finding
    except Exception as error:  # report it, continue with the next check
        text = f"{type(error).__name__}: {error} (after {time.perf_counter() - start:.0f} s)"
        yield Finding(title, "problem", text, "the check itself failed: report it with the lines above")


def _next_quietly(found: Iterator[Finding]) -> Finding | None:
    """Return the next finding; hide progress bars and warnings of the code under test."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return next(found, None)
    finally:
        logging.disable(disabled)


def verdict(findings: Sequence[Finding]) -> str:
    """Summarize in one sentence, then list each problem with its fix."""
    problems = [finding for finding in findings if finding.status == "problem"]
    if not problems:
        return "verdict: this machine can train."
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"verdict: {count}."]
    for number, problem in enumerate(problems, 1):
        lines.append(f"{number}. {problem.name}: {problem.text}")
        lines += [f"   fix: {problem.fix}"] if problem.fix else []
    return "\n".join(lines)
