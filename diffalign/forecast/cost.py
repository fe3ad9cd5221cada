"""Count the model evaluations of a run from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffalign.runtime.progress import crossed
from diffalign.trainers.cost import Cost, Share, Work, guided


def run_work(cost: Cost, config: Any, share: Share, held_out: int) -> Work:
    """Return the work of a whole run for one process. held_out: prompts of an evaluation, over all processes."""
    total = cost.checks(config, share)
    for iteration, updates in iterations(config.max_train_steps, cost.updates(config)):
        total += cost.iteration(config, share, iteration, updates)
    own = len(range(held_out)[share.rank :: share.world])
    each = own * config.eval_images_per_prompt * cost.eval_steps(config) * guided(config) + cost.watched(
        config, held_out
    )
    return total + Work(evaluating=each * evaluations(config, cost.updates(config)))


def iterations(steps: int, updates: int) -> Iterator[tuple[int, int]]:
    """Yield (iteration, number of its updates that the run takes)."""
    for first in range(0, steps, updates):
        yield first // updates, min(updates, steps - first)


def evaluations(config: Any, updates: int) -> int:
    """Return the number of evaluations: at the start, every ``eval_steps``, and at the end."""
    ends = [iteration * updates + done for iteration, done in iterations(config.max_train_steps, updates)]
    starts = [0, *ends[:-1]]
    return 1 + sum(
        end == ends[-1] or crossed(start, end, config.eval_steps) for start, end in zip(starts, ends, strict=True)
    )
