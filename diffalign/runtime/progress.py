"""The progress bar's figures, and an estimate of the remaining time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SHOWN = {"reward": "reward/mean", "acc": "accuracy", "clip": "clip_share", "kl": "kl", "img/s": "images_per_second"}


def progress(metrics: Mapping[str, float]) -> str:
    """Format the metrics to show beside the progress bar."""
    return " ".join(f"{label} {metrics[name]:.3g}" for label, name in SHOWN.items() if name in metrics)


@contextmanager
def paused(bar: Any) -> Iterator[None]:
    """Exclude the time within the context from the bar's rate and estimate."""
    started = time.time()
    try:
        yield
    finally:
        if not bar.disable:
            bar.start_t += time.time() - started
            bar.last_print_t += time.time() - started


def crossed(before: int, after: int, every: int) -> bool:
    """Return whether a multiple of ``every`` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every


class TimeLeft:
    """Estimate the remaining time of a run, once.

    Attributes:
        evaluation: Seconds of the last evaluation; 0 without evaluations.
        printed: Whether the estimate was returned.
    """

    def __init__(self) -> None:
        self.evaluation, self.printed = 0.0, False

    def line(self, args: Any, before: int, step: int, seconds: float) -> str | None:
        """Format the estimate after the first iteration with optimizer steps; return None later or at the end.

        Args:
            args: The configuration.
            before: Optimizer step at the start of the iteration.
            step: Optimizer step at its end.
            seconds: Seconds that the iteration took.
        """
        left = args.max_train_steps - step
        if self.printed or step == before or left <= 0:
            return None
        self.printed = True
        evaluations = evaluations_left(step, args.max_train_steps, args.eval_steps)
        return estimate(left, seconds / (step - before), evaluations if self.evaluation else 0, self.evaluation)


def evaluations_left(step: int, total: int, every: int) -> int:
    """Count the evaluations after optimizer step ``step``, including the last one at ``total``."""
    if step >= total:
        return 0
    return (total // every - step // every if every else 0) + (not every or total % every > 0)


def estimate(steps: int, per_step: float, evaluations: int, per_evaluation: float) -> str:
    """Format the remaining time, with evaluations apart from steps."""
    rest = duration(steps * per_step + evaluations * per_evaluation)
    parts = [f"{steps} step{'s' * (steps > 1)} at {_short(per_step)}"]
    if evaluations and per_evaluation:
        parts.append(f"{evaluations} evaluation{'s' * (evaluations > 1)} at {_short(per_evaluation)}")
    return f"about {rest} to go: {', '.join(parts)}"


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
