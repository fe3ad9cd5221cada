"""The training loop of every trainer: backward, guard, optimizer, EMA, logging, checkpoints and evaluations.

The loop knows disks and processes and no algorithm. A task collects the data of an iteration, splits it into optimizer
steps, and computes the loss of each micro-batch. A run may be stopped between any two micro-batches and resumes bit for
bit: a checkpoint holds a whole optimizer step, and the step that was interrupted is repeated.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffalign.config import to_dict
from diffalign.fsdp import full_tensor, is_sharded
from diffalign.runtime import checkpoint, state
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.ema import EMA
from diffalign.runtime.endings import (
    blame_weights,
    export,
    leave,
    make_room,
    save_before_end,
    save_failed,
    stop_on_streak,
)
from diffalign.runtime.errors import CannotTrain, NotFinite, SaveFailed, StopRequested
from diffalign.runtime.gradient_guard import GradientGuard
from diffalign.runtime.lock import claimed
from diffalign.runtime.oom import memory_errors
from diffalign.runtime.optimizers import lr_factor, make_optimizer
from diffalign.runtime.output import steady_output
from diffalign.runtime.processes import shortfall
from diffalign.runtime.products import all_exported, check_products, prepare_folder
from diffalign.runtime.progress import TimeLeft, crossed, paused, progress
from diffalign.runtime.provenance import origin
from diffalign.runtime.signals import Signals
from diffalign.runtime.task import Metrics, MicroBatch, MiniBatch, Task
from diffalign.runtime.tracking import SAVE, MetricsLog, Trackers
from diffalign.runtime.watchdog import Watchdog
from diffalign.runtime.working_folder import return_to

__all__ = ["Loop", "Metrics", "MicroBatch", "MiniBatch", "Task"]


class Loop:
    """Train the trainable parameters of a module on a task.

    Attributes:
        step: Optimizer steps taken or skipped.
        iteration: Iterations finished.
        update: Optimizer steps finished within the current iteration.
        collected: Metrics of the iteration's data; None until they are collected.
        whole: The task's state after the last optimizer step: what a checkpoint holds.
        evaluated: The step of the last evaluation, -1 before the first; pictured: whether this process ran one.
    """

    def __init__(self, task: Task, module: nn.Module, args: TrainingConfig, accelerator: Accelerator) -> None:
        self.task, self.args, self.accelerator = task, args, accelerator
        args.output_dir = args.output_dir.absolute()  # user code, such as a reward, may change the working folder
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.parameters = parameters
        optimizer = make_optimizer(parameters, args)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: lr_factor(args.lr_scheduler, k, args.lr_warmup_steps, args.max_train_steps)
        )
        self.sharded = is_sharded(module)
        # FSDP2 modules synchronise gradients by themselves: prepare them for mixed precision only.
        prepare = partial(accelerator.prepare_model, evaluation_mode=True) if self.sharded else accelerator.prepare
        self.module, self.optimizer = prepare(module), accelerator.prepare(optimizer)
        self.ema = EMA(parameters, args.ema_decay) if args.ema_decay else None
        self.guard = GradientGuard(args.max_grad_spike)
        self.signals, self.watchdog = Signals(), Watchdog(args.hang_timeout, args.output_dir)
        self.working_folder = os.getcwd()
        self.step = self.iteration = self.update = 0
        self.evaluated = -1
        self.collected: Metrics | None = None
        self.stop_agreed = self.applying = self.pictured = False
        self.saved = (0, 0, -1)  # (step, update, evaluated) of the last checkpoint
        self.failed_saves = 0
        self.time_left = TimeLeft()

    def origin(self) -> dict[str, Any]:
        """Describe the configuration, data and machine of this run, for its checkpoints."""
        task, processes, device = self.task, self.accelerator.num_processes, self.accelerator.device.type
        return origin(self.args, task.data_digest, processes, device, task.commits, task.contents)

    # The run --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to ``max_train_steps``, from the start or from a checkpoint.

        Raises:
            Interrupted: A signal stopped the run, which is saved.
            SaveFailed, NotFinite, OutOfMemory: See ``runtime.errors``.
            ValueError: The folder is in use or cannot be written, or the checkpoint belongs to another run.
        """
        lock = claimed(self.args.output_dir) if self.accelerator.is_main_process else contextlib.nullcontext()
        with steady_output(), lock, self.signals, self.watchdog:
            try:
                if self._begin():
                    self._train()
            except StopRequested:
                leave(self)
            except (NotFinite, SaveFailed, CannotTrain):
                raise  # their checkpoints are written already, or cannot be written
            except Exception as error:
                blame_weights(self, error)
                save_before_end(self)
                raise

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the task stops early."""
        return self.step >= self.args.max_train_steps or self.task.done

    @property
    def taken(self) -> int:
        """Optimizer steps taken and not skipped."""
        return self.step - self.guard.skipped

    def _begin(self) -> bool:
        """Load the checkpoint to resume from and open the logs; return False if the run is already finished."""
        if self.accelerator.is_main_process:
            check_products(self.args.output_dir)
        path = state.find(self)
        rows = None if path is None else state.put_back(self, path)
        self.whole, self.saved = self.task.state(), self.place()
        checkpoint.check_state({"tasks": self.whole[1], "origin": self.origin(), "guard": self.guard.state()})
        if (
            path is not None
            and self.over
            and self.evaluated == self.step
            and all_exported(self.accelerator, self.args, self.step)
        ):
            self.say(f"nothing to do: this run has had its {self.step} steps")
            return False
        self.trackers = Trackers(self.accelerator)
        if self.accelerator.is_main_process:
            prepare_folder(self.args, self.say, resumed=path is not None)
            folder, noted = self.args.output_dir, None if path is None else self.guard.noted
            self.log = MetricsLog(folder / "metrics.jsonl", rows, self.step, self.evaluated == self.step)
            self.skips = MetricsLog(folder / "skipped.jsonl", noted, self.step)
            self.trackers.start("diffalign", to_dict(self.args))
        if path is not None:
            self.say(f"resumed from {path} at step {self.step}")
        elif self.args.resume_from_checkpoint:
            self.say(f"no checkpoint in {self.args.output_dir}: a fresh start")
        return True

    def _train(self) -> None:
        with tqdm(total=self.args.max_train_steps, initial=self.step, desc="train",
                  disable=not self.accelerator.is_main_process, dynamic_ncols=True) as bar:  # fmt: skip
            while True:
                if self.over and self.update:
                    self._next_iteration()  # the rest of the iteration's data is not needed
                with paused(bar):
                    self._evaluate_and_save()
                if self.over:
                    break
                self._iterate(bar)
        self.watchdog.beat()
        export(self)
        self.trackers.finish()

    def _evaluate_and_save(self) -> None:
        """Evaluate and checkpoint if due at this iteration boundary, including work left by an interrupted run."""
        if self.update:
            return
        if self.evaluated < 0 or (self.over and self.evaluated != self.step) or self._crossed(self.evaluated, "eval"):
            self._evaluate()
        last = self.over  # an evaluation may end the run
        if self.step and self.saved != self.place() and (last or self._crossed(self.saved[0], "checkpointing")):
            self.save(last)
        if last and not self.pictured:
            self.task.evaluate(self.step)  # all that is missing are the images, which an earlier process held

    def _crossed(self, before: int, what: str) -> bool:
        return crossed(max(0, before), self.step, getattr(self.args, f"{what}_steps"))

    def place(self) -> tuple[int, int, int]:
        """Return (optimizer step, update within the iteration, step of the last evaluation)."""
        return self.step, self.update, self.evaluated

    def _iterate(self, bar: tqdm) -> None:
        before, since = self.step, time.perf_counter()
        collected = self._collect()
        minibatches = islice(self.task.minibatches(self.iteration), self.update, None)
        while self.step < self.args.max_train_steps and (minibatch := next(minibatches, None)) is not None:
            started = time.perf_counter()
            try:
                with memory_errors():
                    if not self.taken:
                        self.task.before_first_update()
                    metrics = self._update(minibatch)
            except torch.OutOfMemoryError as error:
                make_room(self, "update", error)
                minibatches = islice(self.task.minibatches(self.iteration), self.update, None)
                continue
            self._close_update({**metrics, "time/update": time.perf_counter() - started}, collected, bar)
        self._next_iteration()
        if text := self.time_left.line(self.args, before, self.step, time.perf_counter() - since):
            self.say(text)

    def _next_iteration(self) -> None:
        self.iteration, self.update, self.collected = self.iteration + 1, 0, None

    def _close_update(self, metrics: Metrics, collected: Metrics, bar: tqdm) -> None:
        """Log, checkpoint state and stop checks after an optimizer step."""
        failed = None
        try:
            self.task.after_update(self.step, metrics)
            if self.taken == 1 and "skipped" not in metrics:
                self.task.after_first_update()
        except Exception as error:  # the step is taken: log its metrics first
            failed = error
        self._record({**collected, **metrics})
        collected.pop("time/collect", None)  # counted once, however many updates follow
        self.update += 1
        self.whole = self.task.state()
        self.applying = False
        if failed is not None:
            raise failed
        bar.update()
        bar.set_postfix_str(progress({**collected, **metrics}))
        stop_on_streak(self)
        if self.stop_agreed:
            raise StopRequested

    def _collect(self) -> Metrics:
        """Collect the iteration's data, unless a checkpoint restored them; return their metrics."""
        if self.collected is not None:
            return self.collected
        started = time.perf_counter()
        while self.collected is None:
            try:
                self.pulse(together=True)
                with memory_errors():
                    self.collected = self.task.collect(self.iteration)
            except torch.OutOfMemoryError as error:
                make_room(self, "collect", error)
                self.task.restore(*self.whole)
        if not self.update:
            self.collected["time/collect"] = time.perf_counter() - started
        return self.collected

    def pulse(self, together: bool = False) -> None:
        """Re-arm the watchdog between two micro-batches, and raise StopRequested if a signal came.

        Args:
            together: Whether all processes make this call equally often. Several processes can stop only there.
        """
        self.watchdog.beat()
        return_to(self.working_folder, self.say)
        stop = self.signals.received is not None
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(float(stop), device=self.accelerator.device)
            stop = together and self.accelerator.reduce(mine).item() > 0
        if stop:
            raise StopRequested

    # One optimizer step ---------------------------------------------------------------------------------------------

    def _update(self, minibatch: MiniBatch) -> Metrics:
        """Take one optimizer step, unless the guard refuses it; return its metrics, means over all processes."""
        self.optimizer.zero_grad(set_to_none=True)  # an interrupted attempt may have left gradients
        with self.task.updating():
            collected = self._passes(minibatch.micros)
        norm = full_tensor(torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)))
        names = collected[0]
        found = {name: torch.stack([c[name].float() for c in collected]) for name in names}
        # `mean` for the loss, so NaN reaches the guard; `nanmean` for metrics that some micro-batches do not report.
        means = torch.stack([x.mean() if name == "loss" else x.nanmean() for name, x in found.items()])
        stopping = torch.tensor([float(self.signals.received is not None)])
        seen = torch.cat([means, self.guard.flags(means[0], norm.to(means)), stopping.to(means)])
        # The only host synchronisation of an optimizer step: guard, signals and log read the same transfer.
        *values, norm = torch.cat([self.accelerator.reduce(seen, "mean"), norm[None].to(means)]).tolist()
        *shares, stop = values[len(names) :]
        self.stop_agreed = stop > 0
        self.applying = True  # until the step is logged and counted, no checkpoint may be written
        reason = self.guard.reason(shares)
        self._apply(reason, norm, minibatch)
        row = {**dict(zip(names, values, strict=False)), "grad_norm": norm, "lr": self.schedule.get_last_lr()[0]}
        skipped = {} if reason is None else {"skipped": float(self.guard.skipped)}
        return {**row, **skipped, **minibatch.metrics}

    def _passes(self, micros: Sequence[MicroBatch]) -> list[dict[str, Tensor]]:
        """Run the passes of an optimizer step and return their metrics; the last pass synchronises gradients."""
        collected = []
        missing = shortfall(len(micros)) if self.sharded else 0
        for index, micro in enumerate(micros):
            self.pulse()
            last = index == len(micros) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, metrics = self.task.loss(micro)
                loss = loss * micro.weight
                self.accelerator.backward(loss)
            collected.append({"loss": loss.detach() * len(micros), **metrics})
        for _ in range(missing):
            self.accelerator.backward(self.task.loss(micros[-1])[0] * 0)
        return collected

    def _apply(self, reason: str | None, norm: float, minibatch: MiniBatch) -> None:
        """Step the optimizer, or leave every weight, moment and the learning rate unchanged.

        Under fp16 the loss scaler skips overflows by itself, and must see them.
        """
        if reason is not None:
            self._note_skipped(reason, norm, minibatch)
            if self.accelerator.scaler is not None and reason != "gradient not finite":
                self.optimizer.zero_grad(set_to_none=True)  # the scaler's step then moves nothing
        if reason is None or self.accelerator.scaler is not None:
            self.optimizer.step()
        if reason is None:
            self.schedule.step()
            if self.ema is not None:
                self.ema.update()
        self.guard.note(reason, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _note_skipped(self, reason: str, norm: float, minibatch: MiniBatch) -> None:
        """Write what it takes to reproduce a skipped step to ``skipped.jsonl``."""
        own = self.task.ids(minibatch)
        samples = gather_object(own) if self.accelerator.num_processes > 1 else own
        if self.accelerator.is_main_process and reason != "no gradient":
            where = {"iteration": self.iteration, "update": self.update, "seed": self.args.seed}
            row = {"reason": reason, "grad_norm": norm, **where, "samples": samples}
            self.skips.write(self.step + 1, row)
            self.say(f"step {self.step + 1} is not taken: {reason} (norm {norm:.3g}); samples are in skipped.jsonl")

    # What it writes -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        since = time.perf_counter()
        while True:
            try:
                with memory_errors():
                    found = self.task.evaluate(self.step)
                break
            except torch.OutOfMemoryError as error:
                make_room(self, "evaluate", error)
        self._record({f"eval/{name}": value for name, value in found.items()})
        self.time_left.evaluation = time.perf_counter() - since if found else 0.0
        self.evaluated, self.pictured = self.step, True
        self.whole = self.task.state()  # an evaluation may change it

    def _record(self, metrics: Metrics) -> None:
        if self.accelerator.is_main_process:
            self.log.write(self.step, metrics)
            self.trackers.log(metrics, self.step)

    def save(self, last: bool = False) -> Path | None:
        """Writes ``checkpoint-<step>/`` with all that ``state.contents`` lists.

        NotFinite: something in it is not. SaveFailed: the disk refused ``FAILED_SAVES`` times in a row, or once when
        it is the ``last`` save; before, the run goes on with the checkpoints it has.
        """
        self.watchdog.beat()
        started = time.perf_counter()
        tensors, plain = state.contents(self)
        export = self.task.exporter()
        self.saved = self.place()
        if not self.accelerator.is_main_process:
            return None
        try:
            state.check_finite(tensors)
            path = checkpoint.save(self.args.output_dir, self.step, tensors, plain,
                                   keep=self.args.checkpoints_total_limit, export=export)  # fmt: skip
        except NotFinite as error:
            raise NotFinite(f"{error}; last good checkpoint: {self.last_good()}{extremes(self.args)}") from error
        except OSError as error:
            save_failed(self, error, sum(t.nbytes for named in tensors.values() for t in named.values()), last)
            return None
        self.failed_saves = 0
        self._record({SAVE: time.perf_counter() - started})
        self.log.sync()
        return path

    def last_good(self) -> str:
        """Return the path of the newest valid checkpoint, for messages."""
        return str(checkpoint.latest(self.args.output_dir) or "none")

    def say(self, text: str) -> None:
        """Print a line on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)
