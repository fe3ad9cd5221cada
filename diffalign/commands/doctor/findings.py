"""What the doctor found, and how it reads."""

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
    """One thing that was looked at. status: "problem" where training would fail or harm. fix: what to do about it."""

    name: str
    status: Status
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{MARKS[self.status]:2} {self.name:27} {self.text}"


Check = Callable[[], Iterable[Finding]]


def examined(title: str, check: Check) -> Iterator[Finding]:
    """The findings of a check as they come; one that breaks down is a finding too."""
    begun = time.perf_counter()
    try:
        found = iter(check())
        while (finding := _quietly(found)) is not None:
            yield finding
    except Exception as error:  # a doctor tells of what breaks, and goes on
        text = f"{type(error).__name__}: {error} (after {time.perf_counter() - begun:.0f} s)"
        yield Finding(title, "problem", text, "this check itself broke down: report it with the lines above")


def _quietly(found: Iterator[Finding]) -> Finding | None:
    """The next finding, without the progress bars and warnings of what was tried for it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return next(found, None)
    finally:
        logging.disable(disabled)


def verdict(findings: Sequence[Finding]) -> str:
    """A sentence, then each problem with its fix."""
    problems = [finding for finding in findings if finding.status == "problem"]
    if not problems:
        return "verdict: this machine can train."
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"verdict: {count}."]
    for number, problem in enumerate(problems, 1):
        lines.append(f"{number}. {problem.name}: {problem.text}")
        lines += [f"   fix: {problem.fix}"] if problem.fix else []
    return "\n".join(lines)
