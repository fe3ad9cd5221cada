"""Collect the state of a training loop for a checkpoint, and restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from diffalign.fsdp import full_tensor, shard_like
from diffalign.runtime import checkpoint
from diffalign.runtime.errors import NotFinite
from diffalign.runtime.gradient_guard import first_bad
from diffalign.runtime.oom import is_out_of_memory
from diffalign.runtime.provenance import check_origin

if TYPE_CHECKING:
    from diffalign.runtime.loop import Loop

# Groups that may contain NaN (untrained nodes have no log-prob).
MAY_HOLD_NAN = ("iteration", "collected")
Tensors = dict[str, dict[str, Tensor]]
PART = 1 << 26  # bytes per gather


def contents(loop: Loop) -> tuple[Tensors, dict[str, Any]]:
    """Return (tensors, JSON state) of the run at its last whole optimizer step. Collective.

    Sharded tensors are gathered to full ones on the CPU of the main process.

    A mid-iteration checkpoint stores the iteration's data: collecting them again would need the weights from the start
    of the iteration.
    """
    accelerator = loop.accelerator
    moments, optimizer = checkpoint.flatten_optimizer(loop.optimizer.optimizer)
    own_tensors, own_state = loop.whole
    tensors: Tensors = {"weights": indexed(loop.parameters), "optimizer": moments}
    tensors |= {"task": own_tensors} if own_tensors else {}
    state = {
        "step": loop.step,
        "iteration": loop.iteration,
        "update": loop.update,
        "evaluated": loop.evaluated,
        "rows": loop.log.rows if accelerator.is_main_process else 0,
        "optimizer": optimizer,
        "schedule": loop.schedule.state_dict(),
        "guard": loop.guard.state(),
        # Data streams have a cursor per process; all else is the same on all processes.
        "tasks": gather_object([own_state]) if accelerator.num_processes > 1 else [own_state],
        "origin": loop.origin(),
    }
    if loop.collected is not None and (data := loop.task.collected()):
        tensors["iteration"] = {name: everyones(accelerator, tensor) for name, tensor in data.items()}
        tensors["collected"] = {n: torch.tensor(v, dtype=torch.float64) for n, v in loop.collected.items()}
    if loop.ema is not None:
        tensors["ema"] = indexed(loop.ema.shadow)
        state["ema_updates"] = loop.ema.updates
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    keep = accelerator.is_main_process
    return {group: {name: full_tensor(t, keep) for name, t in named.items()} for group, named in tensors.items()}, state


def everyones(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Gather rows of all processes, in the order of processes; each has the same number of rows.

    Rows are gathered in parts, because they may not fit on the device at once.
    """
    if accelerator.num_processes == 1:
        return tensor
    parts = tensor.split(max(1, PART // tensor[:1].nbytes))
    found = [accelerator.gather(part.to(accelerator.device)).cpu() for part in parts]
    shares = zip(*(part.chunk(accelerator.num_processes) for part in found), strict=True)
    return torch.cat([torch.cat(share) for share in shares])


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise NotFinite, naming the tensor, where one that must be finite is not."""
    for group, named in tensors.items():
        if group not in MAY_HOLD_NAN and (name := first_bad(dict(named))) is not None:
            raise NotFinite(f"{group}/{name} is not finite, so that no checkpoint is written: lower learning_rate")


def find(loop: Loop) -> Path | None:
    """Return the checkpoint to resume from, or None; the main process chooses for all."""
    args, accelerator = loop.args, loop.accelerator
    if accelerator.num_processes == 1:
        return checkpoint.resolve(args.output_dir, args.resume_from_checkpoint)
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            chosen = [checkpoint.resolve(args.output_dir, args.resume_from_checkpoint)]
        except checkpoint.CheckpointError as error:
            chosen = [error]
    broadcast_object_list(chosen)
    if isinstance(chosen[0], Exception):
        raise chosen[0]
    return chosen[0]


def put_back(loop: Loop, path: Path) -> int:
    """Restore the loop from a checkpoint; return how many rows its log had. ValueError: it belongs to another run."""
    tensors, state = checkpoint.load(path)
    try:
        return _put_back(loop, path, tensors, state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise checkpoint.CheckpointError(
            f"{path} does not hold the state of this run ({problem}): resume from another checkpoint, or start a new "
            "run in another output_dir"
        ) from error


def _put_back(loop: Loop, path: Path, tensors: Tensors, state: dict[str, Any]) -> int:
    _check_place(loop, path, state)
    for line in check_origin(state["origin"], loop.origin(), loop.args):
        loop.say(f"warning: last bits may differ from an uninterrupted run: {line}")
    with torch.no_grad():
        restore(loop.parameters, tensors["weights"])
        if loop.ema is not None:
            restore(loop.ema.shadow, tensors["ema"])
            loop.ema.updates = state["ema_updates"]
    checkpoint.restore_optimizer(loop.optimizer.optimizer, tensors["optimizer"], state["optimizer"])
    loop.schedule.load_state_dict(state["schedule"])
    loop.guard.restore(state["guard"])
    if loop.accelerator.scaler is not None:
        loop.accelerator.scaler.load_state_dict(state["scaler"])
    loop.step, loop.iteration, loop.update = state["step"], state["iteration"], state["update"]
    loop.evaluated = state["evaluated"]
    loop.task.restore(tensors.get("task", {}), _own(state["tasks"], loop))
    if "iteration" in tensors:
        loop.task.recollect(loop.iteration, tensors["iteration"])
        loop.collected = {name: value.item() for name, value in tensors["collected"].items()}
    return state["rows"]


def _check_place(loop: Loop, path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError in mid-iteration if this number of processes would split the remaining updates differently."""
    then, now, task = len(state["tasks"]), loop.accelerator.num_processes, loop.task
    if then != now and 0 < state["update"] < task.updates_per_iteration and not task.world_size_invariant:
        place = f"update {state['update']} of {task.updates_per_iteration}"
        raise ValueError(
            f"{path} lies within an iteration ({place}), of which each of {then} process(es) had a part: go on with "
            f"{then}, or from a checkpoint between two iterations"
        )


def _own(tasks: Sequence[dict[str, Any]], loop: Loop) -> dict[str, Any]:
    if len(tasks) == loop.accelerator.num_processes:
        return tasks[loop.accelerator.process_index]
    if any(task != tasks[0] for task in tasks):
        raise ValueError(f"each process had a place of its own in the data: go on with {len(tasks)} processes")
    return tasks[0]


def indexed(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name tensors by their position, for safetensors."""
    return {f"{index:05d}": tensor.detach() for index, tensor in enumerate(tensors)}


def restore(tensors: Sequence[Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy tensors named by ``indexed`` back in place. ValueError: their number or shapes differ."""
    if len(tensors) != len(stored):
        raise ValueError(
            f"the checkpoint holds {len(stored)} tensors, this run trains {len(tensors)}: use its config.yaml"
        )
    for index, tensor in enumerate(tensors):
        found = stored[f"{index:05d}"]
        if found.shape != tensor.shape:
            raise ValueError(
                f"the checkpoint's tensor {index} is {tuple(found.shape)}, this run's is {tuple(tensor.shape)}: use "
                "the config.yaml of the checkpoint's run"
            )
        tensor.copy_(shard_like(found, tensor))
