"""What a person sees of a run while it goes on: the bar, and an estimate of the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SHOWN = {"reward": "reward/mean", "acc": "accuracy", "clip": "clip_share", "kl": "kl", "img/s": "images_per_second"}


def progress(metrics: Mapping[str, float]) -> str:
    """The figures worth a place beside the progress bar."""
    return " ".join(f"{label} {metrics[name]:.3g}" for label, name in SHOWN.items() if name in metrics)


@contextmanager
def paused(bar: Any) -> Iterator[None]:
    """Keep what happens within out of the bar's rate and of its estimate."""
    started = time.time()
    try:
        yield
    finally:
        if not bar.disable:
            bar.start_t += time.time() - started
            bar.last_print_t += time.time() - started


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every


class TimeLeft:
    """The time that a run still takes, printed once. evaluation: seconds that the last one took, 0 without any."""

    def __init__(self) -> None:
        self.evaluation, self.printed = 0.0, False

    def line(self, args: Any, before: int, step: int, seconds: float) -> str | None:
        """A line after the first iteration, which took steps ``before`` to ``step``; None if it was printed before."""
        left = args.max_train_steps - step
        if self.printed or step == before or left <= 0:
            return None
        self.printed = True
        evaluations = evaluations_left(step, args.max_train_steps, args.eval_steps)
        return estimate(left, seconds / (step - before), evaluations if self.evaluation else 0, self.evaluation)


def evaluations_left(step: int, total: int, every: int) -> int:
    """How many evaluations follow optimizer step ``step``, the last one at ``total`` among them."""
    if step >= total:
        return 0
    return (total // every - step // every if every else 0) + (not every or total % every > 0)


def estimate(steps: int, per_step: float, evaluations: int, per_evaluation: float) -> str:
    """A line about the time that is left; evaluations are counted apart from steps."""
    rest = duration(steps * per_step + evaluations * per_evaluation)
    parts = [f"{steps} step{'s' * (steps > 1)} at {_short(per_step)}"]
    if evaluations and per_evaluation:
        parts.append(f"{evaluations} evaluation{'s' * (evaluations > 1)} at {_short(per_evaluation)}")
    return f"about {rest} to go: {', '.join(parts)}"


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
