"""End a run whose weights or gradients are no numbers any more, with the settings that explain it."""

from __future__ import annotations

from typing import Any

from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import NotFinite
from diffalign.runtime.gradient_guard import STREAK, first_bad
from diffalign.runtime.run import BaseRun, last_good
from diffalign.runtime.state import LoopState, indexed

SCALER_STREAK = 20  # fp16 overflows in a row before the run ends; a few are normal while GradScaler calibrates


def blame_weights(run: BaseRun[Any], state: LoopState, error: Exception) -> None:
    """Raise NotFinite if the weights are not finite, which explains any later error."""
    step, config = state.progress.step, run.config
    if step and first_bad(indexed(state.parameters)) is not None:
        raise NotFinite(
            f"the trained weights are not finite after step {step}: lower learning_rate "
            f"({config.learning_rate:g}), or train in float32; last good checkpoint: {last_good(config)}"
            f"{extremes(config)}. What failed on them: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def too_many_bad_steps(state: LoopState) -> bool:
    """Return whether the last steps in a row were not finite, so that the run has to end."""
    return state.guard.bad >= (STREAK if state.scaler is None else SCALER_STREAK)


def bad_steps(run: BaseRun[Any], state: LoopState) -> NotFinite:
    """Build the error for too many non-finite steps in a row, after the run is saved."""
    return NotFinite(
        f"{state.guard.bad} steps in a row were not finite: lower learning_rate, or train in float32; skipped.jsonl "
        f"names their samples; last good checkpoint: {last_good(run.config)}{extremes(run.config)}"
    )
