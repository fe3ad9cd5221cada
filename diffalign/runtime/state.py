"""What a checkpoint of the loop holds, and how it is put back."""

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

# Where NaN is a value like others: nodes that are not trained have no log-prob.
MAY_HOLD_NAN = ("iteration", "collected")
Tensors = dict[str, dict[str, Tensor]]
PART = 1 << 26  # bytes that processes send each other at once


def contents(loop: Loop) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, state) of the run at its last whole optimizer step; every process calls it.

    What is in shards becomes whole, on the CPU, for the main process; for the others it stays as it is.

    An iteration that is not over brings its data along, where collecting them again would take the weights of then.
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
        # Streams of data have a place per process; all else is the same everywhere.
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
    """The rows of all processes, which have equally many, in the order of processes.

    They travel in parts, so that a device need not have room for what waits in main memory.
    """
    if accelerator.num_processes == 1:
        return tensor
    parts = tensor.split(max(1, PART // tensor[:1].nbytes))
    found = [accelerator.gather(part.to(accelerator.device)).cpu() for part in parts]
    shares = zip(*(part.chunk(accelerator.num_processes) for part in found), strict=True)
    return torch.cat([torch.cat(share) for share in shares])


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """NotFinite, with the name of a tensor, for what must never become a checkpoint."""
    for group, named in tensors.items():
        if group not in MAY_HOLD_NAN and (name := first_bad(dict(named))) is not None:
            raise NotFinite(f"{group}/{name} is not finite, so that no checkpoint is written: lower learning_rate")


def find(loop: Loop) -> Path | None:
    """The checkpoint to go on from; one process chooses, so that all take the same."""
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
    """Makes the loop what it was; returns how many rows its log had then. ValueError: it is another run's."""
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
    """ValueError within an iteration whose remaining updates another number of processes would split otherwise."""
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
    """Tensors by position, as safetensors wants them: named."""
    return {f"{index:05d}": tensor.detach() for index, tensor in enumerate(tensors)}


def restore(tensors: Sequence[Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copies back what ``indexed`` named. ValueError where the number of tensors differs."""
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
