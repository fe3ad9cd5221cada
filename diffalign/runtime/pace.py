"""Functions of the step: the learning rate, what is due, and what the progress bar shows."""

from __future__ import annotations

import math

from diffalign.runtime.task import Metrics


def lr_factor(name: str, step: int, warmup: int, total: int) -> float:
    """The share of the peak learning rate for optimizer step ``step`` (from 0) of ``total``.

    Rises over ``warmup`` steps, never from 0, because an update that moves nothing is wasted (and looks like a broken
    adapter); then stays ("constant"), or falls to 0 after the last step ("linear", "cosine").
    """
    done = max(0, step - warmup) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return min(1.0, (step + 1) / (warmup + 1)) * shape[name]


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every


def progress(metrics: Metrics) -> str:
    """The figures worth a place beside the progress bar."""
    shown = {"reward": "reward/mean", "acc": "accuracy", "clip": "clip_share", "kl": "kl", "img/s": "images_per_second"}
    return " ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items() if name in metrics)
