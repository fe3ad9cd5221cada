"""End a run: write its exports, or raise an error that names its cause after saving finished steps."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, NoReturn

import torch
from safetensors import SafetensorError

from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import Interrupted, NotFinite, OutOfMemory, SaveFailed
from diffalign.runtime.gradient_guard import STREAK, first_bad
from diffalign.runtime.oom import advice, batch_name
from diffalign.runtime.products import write_exports
from diffalign.runtime.state import indexed

if TYPE_CHECKING:
    from diffalign.runtime.loop import Loop

FAILED_SAVES = 3  # in a row before the run ends
SCALER_STREAK = 20  # fp16 overflows in a row before the run ends; a few are normal while GradScaler calibrates


def blame_weights(loop: Loop, error: Exception) -> None:
    """Raise NotFinite if the weights are not finite: they caused whatever failed afterwards."""
    bad = first_bad(indexed(loop.parameters))
    if bad is not None and loop.step:
        raise NotFinite(
            f"the trained weights are not finite after step {loop.step}: lower learning_rate "
            f"({loop.args.learning_rate:g}), or train in float32; last good checkpoint: {loop.last_good()}"
            f"{extremes(loop.args)}. What failed on them: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def save_before_end(loop: Loop) -> None:
    """Save finished steps before an error ends a run of one process; several processes may be at different points."""
    if loop.accelerator.num_processes > 1 or loop.applying or not loop.step or loop.saved == loop.place():
        return
    with contextlib.suppress(Exception):  # must not hide the error that ends the run
        loop.optimizer.zero_grad(set_to_none=True)
        loop.say(f"step {loop.step} is saved before the run ends: {loop.save()}")


def stop_on_streak(loop: Loop) -> None:
    """Save and raise NotFinite after too many non-finite steps in a row."""
    if loop.guard.bad < (STREAK if loop.accelerator.scaler is None else SCALER_STREAK):
        return
    loop.save()
    raise NotFinite(
        f"{loop.guard.bad} steps in a row were not finite: lower learning_rate, or train in float32; "
        f"skipped.jsonl names their samples; last good checkpoint: {loop.last_good()}{extremes(loop.args)}"
    )


def diverged(loop: Loop, what: str) -> NotFinite:
    """Return the error for images or losses that are not finite although no step was skipped."""
    if not loop.taken:
        text = f"{what} before the first update: lower guidance_scale, or set mixed_precision: no"
    else:
        text = f"{what} after {loop.taken} updates: the model has diverged; lower learning_rate"
    return NotFinite(f"{text}; last good checkpoint: {loop.last_good()}{extremes(loop.args)}")


def make_room(loop: Loop, phase: str, error: torch.OutOfMemoryError) -> None:
    """Halve the batch size of a phase with ``auto_batch``, else raise OutOfMemory with settings to change."""
    name = batch_name(loop.args, phase)
    size = getattr(loop.args, name, 1)
    if not loop.args.auto_batch or size == 1 or loop.accelerator.num_processes > 1:
        hint = "" if loop.args.auto_batch else "; or auto_batch: true, which halves batches by itself"
        raise OutOfMemory(
            f"out of memory in step {loop.step + 1} ({phase}): try {advice(loop.args, phase)}{hint}"
        ) from error
    setattr(loop.args, name, size // 2)
    loop.say(f"out of memory ({phase}): {name} is {size // 2} from now on")
    loop.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def export(loop: Loop) -> None:
    """Write the exports of a run, and last the manifest with their checksums."""
    try:
        written = loop.task.finish()
        if loop.accelerator.is_main_process and written is not None:
            write_exports(loop.args.output_dir, loop.step, written)
    except (OSError, SafetensorError) as error:
        raise SaveFailed(
            f"the exports in {loop.args.output_dir} could not be written ({str(error)[:300]}): free space on the "
            f"disk and start the same run again; it exports from {loop.last_good()}"
        ) from error


def leave(loop: Loop) -> NoReturn:
    """Save the last whole optimizer step, print the command that resumes, and raise Interrupted."""
    loop.optimizer.zero_grad(set_to_none=True)
    if loop.saved != loop.place() or not loop.step:
        loop.save(last=True)
    loop.say(f"stopped at step {loop.step}; go on with:\n  {loop.task.resume_command}")
    loop.trackers.finish()
    raise Interrupted(loop.signals.received or signal.SIGTERM)


def save_failed(loop: Loop, error: OSError, size: int, last: bool) -> None:
    """Report a checkpoint that could not be written; raise SaveFailed if the run must not continue without one."""
    loop.failed_saves += 1
    text = f"checkpoint-{loop.step} in {loop.args.output_dir} could not be written ({size:,} bytes: {error})"
    if last or loop.failed_saves >= FAILED_SAVES:
        raise SaveFailed(f"{text}: free space on the disk; last good checkpoint: {loop.last_good()}") from error
    loop.say(f"warning: {text}: the run goes on")
