"""Save a run as a checkpoint and restore it: the loop's state, the algorithm's, and the iteration in progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from diffalign.fsdp import full_tensor
from diffalign.log import get_logger
from diffalign.runtime import checkpoint
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import NotFinite, SaveFailed
from diffalign.runtime.gradient_guard import first_bad
from diffalign.runtime.interfaces import IterationBatch, LoopAlgorithm, RunOutputs
from diffalign.runtime.oom import is_out_of_memory
from diffalign.runtime.output_copy import find_checkpoint
from diffalign.runtime.provenance import check_origin
from diffalign.runtime.run import BaseRun, last_good
from diffalign.runtime.state import LoopState, Tensors

logger = get_logger(__name__)

FAILED_SAVES = 3  # in a row before the run ends
# Groups that may contain NaN (untrained nodes have no log-prob).
MAY_HOLD_NAN = ("iteration", "collected")
PART = 1 << 26  # bytes per gather
B = TypeVar("B", bound=IterationBatch)


class Checkpointer(Generic[B]):
    """Write and read the checkpoints of a run.

    A checkpoint holds whole optimizer steps. Within an iteration it also holds the iteration's data: collecting them
    again would need the weights from the start of the iteration.

    Attributes:
        snapshot: The algorithm's state after the last whole optimizer step.
        saved: ``Progress.position`` of the last checkpoint.
    """

    def __init__(self, run: BaseRun[Any], state: LoopState, algorithm: LoopAlgorithm[B], outputs: RunOutputs) -> None:
        self.run, self.state, self.algorithm, self.outputs = run, state, algorithm, outputs
        self.snapshot = algorithm.state_dict()
        self.saved = (0, 0, -1)
        self._failed = 0

    def take_snapshot(self) -> None:
        """Keep the algorithm's state; called after each whole optimizer step and each evaluation."""
        self.snapshot = self.algorithm.state_dict()

    @property
    def is_current(self) -> bool:
        """Whether the last checkpoint has the current state."""
        return self.saved == self.state.progress.position

    # Save -----------------------------------------------------------------------------------------------------------

    def save(self, batch: B | None, rows: int, last: bool = False) -> Path | None:
        """Write ``checkpoint-<step>/``; return its path on the main process, None elsewhere. Collective.

        Args:
            batch: The data of the iteration in progress; None between two iterations.
            rows: Rows of metrics.jsonl so far.
            last: Whether the run has no later chance to save.

        Raises:
            NotFinite: A tensor that must be finite is not.
            SaveFailed: The disk refused ``FAILED_SAVES`` times in a row, or once for the ``last`` save; before, the run
                continues with the checkpoints it has.
        """
        config, step = self.run.config, self.state.progress.step
        tensors, plain = self._contents(batch, rows)
        export = self.outputs.exporter()
        self.saved = self.state.progress.position
        if not self.run.accelerator.is_main_process:
            return None

        try:
            check_finite(tensors)
            path = checkpoint.save(
                config.output_dir, step, tensors, plain, keep=config.checkpoints_total_limit, export=export
            )
        except NotFinite as error:
            raise NotFinite(f"{error}; last good checkpoint: {last_good(config)}{extremes(config)}") from error
        except OSError as error:
            self._report_failure(error, sum(t.nbytes for named in tensors.values() for t in named.values()), last)
            return None
        self._failed = 0
        return path

    def _contents(self, batch: B | None, rows: int) -> tuple[Tensors, dict[str, Any]]:
        """Return (tensors, JSON values); sharded tensors are gathered on the CPU of the main process."""
        accelerator = self.run.accelerator
        tensors, plain = self.state.state_dict()
        own_tensors, own_values = self.snapshot
        tensors |= {"task": own_tensors} if own_tensors else {}
        plain |= {
            "rows": rows,
            # Data streams have a cursor per process; all else is the same on all processes.
            "tasks": gather_object([own_values]) if accelerator.num_processes > 1 else [own_values],
            "origin": self.outputs.origin(),
        }
        if batch is not None and (data := batch.state_dict()):
            tensors["iteration"] = {name: gather_rows(accelerator, tensor) for name, tensor in data.items()}
            tensors["collected"] = {n: torch.tensor(v, dtype=torch.float64) for n, v in batch.metrics.items()}
        keep = accelerator.is_main_process
        return {
            group: {name: full_tensor(t, keep) for name, t in named.items()} for group, named in tensors.items()
        }, plain

    def _report_failure(self, error: OSError, size: int, last: bool) -> None:
        self._failed += 1
        folder, step = self.run.config.output_dir, self.state.progress.step
        text = f"checkpoint-{step} in {folder} could not be written ({size:,} bytes: {error})"
        if last or self._failed >= FAILED_SAVES:
            good = last_good(self.run.config)
            raise SaveFailed(f"{text}: free space on the disk; last good checkpoint: {good}") from error
        logger.warning(f"{text}: the run goes on")

    # Restore --------------------------------------------------------------------------------------------------------

    def find(self) -> Path | None:
        """Return the checkpoint to resume from, or None; the main process chooses for all."""
        config, accelerator = self.run.config, self.run.accelerator
        if accelerator.num_processes == 1:
            return find_checkpoint(config)
        chosen: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                chosen = [find_checkpoint(config)]
            except checkpoint.CheckpointError as error:
                chosen = [error]
        broadcast_object_list(chosen)
        if isinstance(chosen[0], Exception):
            raise chosen[0]
        return chosen[0]

    def restore(self, path: Path) -> tuple[B | None, int]:
        """Restore the run; return the data of the iteration in progress, and how many rows the log had.

        Raises:
            ValueError: The checkpoint is damaged, or belongs to another run.
        """
        tensors, plain = checkpoint.load(path)
        try:
            return self._restore(path, tensors, plain), plain["rows"]
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            problem = f"{type(error).__name__}: {str(error)[:300]}"
            raise checkpoint.CheckpointError(
                f"{path} does not hold the state of this run ({problem}): resume from another checkpoint, or start a "
                "new run in another output_dir"
            ) from error

    def _restore(self, path: Path, tensors: Tensors, plain: dict[str, Any]) -> B | None:
        self._check_world(path, plain)
        for line in check_origin(plain["origin"], self.outputs.origin(), self.run.config):
            logger.warning(f"last bits may differ from an uninterrupted run: {line}")

        self.state.load_state_dict(tensors, plain)
        self.algorithm.load_state_dict((tensors.get("task", {}), self._own_values(plain["tasks"])))
        if "iteration" not in tensors:
            return None
        metrics = {name: value.item() for name, value in tensors["collected"].items()}
        return self.algorithm.restored(self.state.progress.iteration, tensors["iteration"], metrics)

    def _check_world(self, path: Path, plain: Mapping[str, Any]) -> None:
        """Raise ValueError in mid-iteration if this number of processes would split the other updates differently."""
        then, now, total = len(plain["tasks"]), self.run.accelerator.num_processes, self.algorithm.updates_per_iteration
        if then != now and 0 < plain["update"] < total and not self.algorithm.world_size_invariant:
            raise ValueError(
                f"{path} lies within an iteration (update {plain['update']} of {total}), of which each of {then} "
                f"process(es) had a part: go on with {then}, or from a checkpoint between two iterations"
            )

    def _own_values(self, values: Sequence[dict[str, Any]]) -> dict[str, Any]:
        accelerator = self.run.accelerator
        if len(values) == accelerator.num_processes:
            return values[accelerator.process_index]
        if any(value != values[0] for value in values):
            raise ValueError(f"each process had a position of its own in the data: go on with {len(values)} processes")
        return values[0]


def gather_rows(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Gather rows of all processes, in the order of processes; each has the same number of rows.

    Rows are gathered in parts, because they may not fit on the device at once.
    """
    if accelerator.num_processes == 1:
        return tensor
    parts = tensor.split(max(1, PART // tensor[:1].nbytes))
    found = [torch.as_tensor(accelerator.gather(part.to(accelerator.device))).cpu() for part in parts]
    shares = zip(*(part.chunk(accelerator.num_processes) for part in found), strict=True)
    return torch.cat([torch.cat(share) for share in shares])


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise NotFinite with the name of the tensor if one that must be finite is not."""
    for group, named in tensors.items():
        if group not in MAY_HOLD_NAN and (name := first_bad(dict(named))) is not None:
            raise NotFinite(f"{group}/{name} is not finite, so that no checkpoint is written: lower learning_rate")
