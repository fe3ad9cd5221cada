"""The one loop: backward, guard, optimizer, EMA, logging, checkpoints and evaluations, for every trainer.

It knows disks and processes and no algorithm. A task says what an iteration collects and yields the losses of each
optimizer step, a micro-batch at a time. A run may be stopped between any two micro-steps, and goes on bit for bit:
checkpoints are of whole optimizer steps, and what had begun since is done again.
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
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.config import to_dict
from diffalign.fsdp import full_tensor, is_sharded
from diffalign.runtime import checkpoint, state
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.ema import EMA
from diffalign.runtime.endings import blame_weights, export, leave, make_room, save_before_end, save_failed
from diffalign.runtime.errors import CannotTrain, NotFinite, SaveFailed, StopRequested
from diffalign.runtime.gradient_guard import STREAK, GradientGuard
from diffalign.runtime.lock import claimed
from diffalign.runtime.oom import memory_errors
from diffalign.runtime.optimizers import lr_factor, make_optimizer
from diffalign.runtime.output import steady_output
from diffalign.runtime.processes import shortfall
from diffalign.runtime.products import EXPORTS, check_products, is_exported, keep_others, save_config
from diffalign.runtime.progress import TimeLeft, crossed, paused, progress
from diffalign.runtime.provenance import origin
from diffalign.runtime.signals import Signals
from diffalign.runtime.state import indexed, restore
from diffalign.runtime.task import Metrics, Micro, Task
from diffalign.runtime.tracking import SAVE, MetricsLog, Trackers
from diffalign.runtime.watchdog import Watchdog

__all__ = ["Loop", "Metrics", "Micro", "Task", "crossed", "indexed", "lr_factor", "progress", "restore"]

SCALER_STREAK = 20  # a loss scaler finds its scale by overflows: so many in a row are no search


class Loop:
    """Runs a task on a module's trainable parameters.

    step: optimizer steps that were taken or skipped. iteration, update: where the run is, update of those within the
    iteration that are done. collected: the figures of the iteration's data, None until they are there. whole: the
    task's state after the last optimizer step. evaluated: the step of the last evaluation, -1 before the first.
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
        # What is sharded shares gradients by itself, and needs no wrapper but for its precision.
        prepare = partial(accelerator.prepare_model, evaluation_mode=True) if self.sharded else accelerator.prepare
        self.module, self.optimizer = prepare(module), accelerator.prepare(optimizer)
        self.ema = EMA(parameters, args.ema_decay) if args.ema_decay else None
        self.guard = GradientGuard(args.max_grad_spike)
        self.signals, self.watchdog = Signals(), Watchdog(args.hang_timeout, args.output_dir)
        self.working_folder = os.getcwd()
        self.step = self.iteration = self.update = 0
        self.evaluated = -1
        self.collected: Metrics | None = None
        self.stop_agreed = self.applying = False
        self.saved = (0, 0, -1)  # the place of the last checkpoint
        self.pictured = False  # whether this process has evaluated
        self.failed_saves = 0
        self.time_left = TimeLeft()

    def origin(self) -> dict[str, Any]:
        """The configuration, data and machine of this run."""
        accelerator = self.accelerator
        task, device = self.task, accelerator.device.type
        return origin(self.args, task.data_digest, accelerator.num_processes, device, task.commits, task.contents)

    # The run --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to ``max_train_steps``, from the beginning or from a checkpoint.

        Interrupted: a signal came, and the run is saved. SaveFailed, NotFinite, OutOfMemory: see there. ValueError: the
        folder is in use or cannot be written, or the checkpoint is another run's.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(steady_output())
            if self.accelerator.is_main_process:
                stack.enter_context(claimed(self.args.output_dir))
            stack.enter_context(self.signals)
            stack.enter_context(self.watchdog)
            try:
                if self._begin():
                    self._train()
            except StopRequested:
                leave(self)
            except (NotFinite, SaveFailed, CannotTrain):
                raise  # whose checkpoints are written already, or cannot be
            except Exception as error:
                blame_weights(self, error)
                save_before_end(self)
                raise

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the task has seen enough."""
        return self.step >= self.args.max_train_steps or self.task.done

    @property
    def taken(self) -> int:
        """How many optimizer steps were taken, and not skipped."""
        return self.step - self.guard.skipped

    def _begin(self) -> bool:
        """Finds the place to go on from; False where nothing is left to do."""
        if self.accelerator.is_main_process:
            check_products(self.args.output_dir)
        path = state.find(self)
        rows = None if path is None else state.put_back(self, path)
        self.whole, self.saved = self.task.state(), self.place()
        checkpoint.check_state({"tasks": self.whole[1], "origin": self.origin(), "guard": self.guard.state()})
        if path is not None and self.over and self._is_finished():
            self.say(f"nothing to do: this run has had its {self.step} steps")
            return False
        self.trackers = Trackers(self.accelerator)
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.args.output_dir)
            if path is None and (aside := checkpoint.put_aside(self.args.output_dir)):
                self.say(f"checkpoints of an earlier run are in {aside}")
            for name, kept in keep_others(self.args).items():
                self.say(f"{name} in {self.args.output_dir} was not written by this run: it is now {kept.name}")
            (self.args.output_dir / EXPORTS).unlink(missing_ok=True)  # the run is not finished any more
            save_config(self.args)
            folder, noted = self.args.output_dir, None if path is None else self.guard.noted
            self.log = MetricsLog(folder / "metrics.jsonl", rows, self.step, self.evaluated == self.step)
            self.skips = MetricsLog(folder / "skipped.jsonl", noted, self.step)
            self.trackers.start("diffalign", to_dict(self.args))
        if path is not None:
            self.say(f"resumed from {path} at step {self.step}")
        elif self.args.resume_from_checkpoint:
            self.say(f"no checkpoint in {self.args.output_dir}: a fresh start")
        return True

    def _is_finished(self) -> bool:
        """Whether the exports of the last step are there, as their manifest has them; one process looks for all."""
        found = [self.evaluated == self.step and is_exported(self.args.output_dir, self.step)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return found[0]

    def _train(self) -> None:
        with tqdm(total=self.args.max_train_steps, initial=self.step, desc="train",
                  disable=not self.accelerator.is_main_process, dynamic_ncols=True) as bar:  # fmt: skip
            while True:
                if self.over and self.update:
                    self._next_iteration()  # which is over, whatever is left of its data
                with paused(bar):
                    self._evaluate_and_save()
                if self.over:
                    break
                self._iterate(bar)
        self.watchdog.beat()
        export(self)
        self.trackers.finish()

    def _evaluate_and_save(self) -> None:
        """What is due between two iterations; a run that was stopped before, or in the midst of it, does it now."""
        if self.update:
            return
        if self.evaluated < 0 or (self.over and self.evaluated != self.step) or self._crossed(self.evaluated, "eval"):
            self._evaluate()
        last = self.over  # an evaluation may end the run
        if self.step and self.saved != self.place() and (last or self._crossed(self.saved[0], "checkpointing")):
            self.save(last)
        if last and not self.pictured:
            self.task.evaluate(self.step)  # finished but for its pictures, which another process had

    def _crossed(self, before: int, what: str) -> bool:
        return crossed(max(0, before), self.step, getattr(self.args, f"{what}_steps"))

    def place(self) -> tuple[int, int, int]:
        """Return where the run is: optimizer step, update within the iteration, step of the last evaluation."""
        return self.step, self.update, self.evaluated

    def _iterate(self, bar: tqdm) -> None:
        before, since = self.step, time.perf_counter()
        collected = self._collect()
        updates = islice(self.task.updates(self.iteration), self.update, None)
        while self.step < self.args.max_train_steps and (micros := next(updates, None)) is not None:
            started = time.perf_counter()
            try:
                with memory_errors():
                    if not self.taken:
                        self.task.before_first_update()
                    metrics = self._update(micros)
            except torch.OutOfMemoryError as error:
                make_room(self, "update", error)
                updates = islice(self.task.updates(self.iteration), self.update, None)
                continue
            self._close_update({**metrics, "time/update": time.perf_counter() - started}, collected, bar)
        self._next_iteration()
        if text := self.time_left.line(self.args, before, self.step, time.perf_counter() - since):
            self.say(text)

    def _next_iteration(self) -> None:
        self.iteration, self.update, self.collected = self.iteration + 1, 0, None

    def _close_update(self, metrics: Metrics, collected: Metrics, bar: tqdm) -> None:
        """What follows an optimizer step, after which the run is whole again."""
        failed = None
        try:
            self.task.after_update(self.step, metrics)
            if self.taken == 1 and "skipped" not in metrics:
                self.task.after_first_update()
        except Exception as error:  # the step is taken all the same, and its figures are logged
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
        if self.guard.bad >= (STREAK if self.accelerator.scaler is None else SCALER_STREAK):
            self.save()
            raise NotFinite(
                f"{self.guard.bad} steps in a row were not finite: lower learning_rate, or train in float32; "
                f"skipped.jsonl names their samples; last good checkpoint: {self.last_good()}{extremes(self.args)}"
            )
        if self.stop_agreed:
            raise StopRequested

    def _collect(self) -> Metrics:
        """The figures of the iteration's data, which are collected unless a checkpoint brought them."""
        if self.collected is not None:
            return self.collected
        begun = time.perf_counter()
        while self.collected is None:
            try:
                self.pulse(together=True)
                with memory_errors():
                    self.collected = self.task.collect(self.iteration)
            except torch.OutOfMemoryError as error:
                make_room(self, "collect", error)
                self.task.restore(*self.whole)
        if not self.update:
            self.collected["time/collect"] = time.perf_counter() - begun
        return self.collected

    def pulse(self, together: bool = False) -> None:
        """Between two micro-steps: the run is alive, and stops here if a signal asked it to.

        together: whether all processes come by here equally often. Several can stop only where they do.
        """
        self.watchdog.beat()
        self._stay_in_folder()
        stop = self.signals.received is not None
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(float(stop), device=self.accelerator.device)
            stop = together and self.accelerator.reduce(mine).item() > 0
        if stop:
            raise StopRequested

    def _stay_in_folder(self) -> None:
        """Undo a change of the working folder by user code: data are read from relative paths all along."""
        try:
            now = os.getcwd()
        except OSError:
            now = "a folder that is gone"
        if now != self.working_folder:
            os.chdir(self.working_folder)
            self.say(f"warning: a reward changed the working folder to {now}; the run stays in {self.working_folder}")

    # One optimizer step ---------------------------------------------------------------------------------------------

    def _update(self, micros: Sequence[Micro]) -> Metrics:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)  # what a stopped or failed attempt left
        with self.task.updating():
            collected = self._passes(micros)
        norm = full_tensor(torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)))
        names = collected[0]
        found = {name: torch.stack([c[name].float() for c in collected]) for name in names}
        # The guard must see a loss that is no number; a figure that a pass has none of is the mean of the others.
        means = torch.stack([x.mean() if name == "loss" else x.nanmean() for name, x in found.items()])
        stopping = torch.tensor([float(self.signals.received is not None)])
        seen = torch.cat([means, self.guard.flags(means[0], norm.to(means)), stopping.to(means)])
        # One synchronisation per optimizer step: the guard and the signals need numbers, and the log's come with them.
        *values, norm = torch.cat([self.accelerator.reduce(seen, "mean"), norm[None].to(means)]).tolist()
        *shares, stop = values[len(names) :]
        self.stop_agreed = stop > 0
        self.applying = True  # until the step is logged and counted, the run is between two states
        reason = self.guard.reason(shares)
        self._apply(reason, norm)
        row = {**dict(zip(names, values, strict=False)), "grad_norm": norm, "lr": self.schedule.get_last_lr()[0]}
        return row if reason is None else {**row, "skipped": float(self.guard.skipped)}

    def _passes(self, micros: Sequence[Micro]) -> list[dict[str, Tensor]]:
        """Forwards and backwards; figures of each. Gradients add up; processes synchronise at the last one."""
        collected = []
        missing = shortfall(len(micros)) if self.sharded else 0
        for index, micro in enumerate(micros):
            self.pulse()
            last = index == len(micros) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, metrics = micro()
                self.accelerator.backward(loss)
            collected.append({"loss": loss.detach() * len(micros), **metrics})
        for _ in range(missing):
            self.accelerator.backward(micros[-1]()[0] * 0)
        return collected

    def _apply(self, reason: str | None, norm: float) -> None:
        """Steps the optimizer, or leaves every weight, moment and the learning rate as they are.

        Under fp16 the loss scaler decides by itself, and needs to see overflows.
        """
        if reason is not None:
            self._note_skipped(reason, norm)
            if self.accelerator.scaler is not None and reason != "gradient not finite":
                self.optimizer.zero_grad(set_to_none=True)  # the scaler is told of a step that moves nothing
        if reason is None or self.accelerator.scaler is not None:
            self.optimizer.step()
        if reason is None:
            self.schedule.step()
            if self.ema is not None:
                self.ema.update()
        self.guard.note(reason, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _note_skipped(self, reason: str, norm: float) -> None:
        """A line in ``skipped.jsonl`` with what it takes to look at the step again."""
        own = self.task.samples()
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
        self.whole = self.task.state()  # which may hold what was seen

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
        begun = time.perf_counter()
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
        self._record({SAVE: time.perf_counter() - begun})
        self.log.sync()
        return path

    def last_good(self) -> str:
        """Name the newest checkpoint that is sound, for messages."""
        return str(checkpoint.latest(self.args.output_dir) or "none")

    def say(self, text: str) -> None:
        """A line for the user, from one process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)
