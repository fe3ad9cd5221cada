"""The training loop of every trainer: iterations, backward passes, guard, logging, checkpoints and evaluations.

The loop knows disks and processes and no algorithm. A run may be stopped between any two micro-batches and resumed bit
for bit: a checkpoint holds a whole optimizer step, and the step that was interrupted is repeated.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.config import to_dict
from diffalign.fsdp import full_tensor
from diffalign.log import get_logger, log_to_file
from diffalign.runtime import checkpoint
from diffalign.runtime.callbacks import Callbacks, TrainerCallback
from diffalign.runtime.checkpointer import Checkpointer
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import CannotTrain, Interrupted, NotFinite, SaveFailed, StopRequested
from diffalign.runtime.failures import bad_steps, blame_weights, too_many_bad_steps
from diffalign.runtime.interfaces import IterationBatch, LoopAlgorithm, Metrics, MiniBatch, RunOutputs
from diffalign.runtime.lock import claimed
from diffalign.runtime.oom import make_room, memory_errors
from diffalign.runtime.output import steady_output
from diffalign.runtime.processes import shortfall
from diffalign.runtime.products import all_exported, check_products, prepare_folder, write_exports
from diffalign.runtime.progress import TimeLeft, crossed, paused, progress
from diffalign.runtime.run import Run, last_good
from diffalign.runtime.state import LoopState
from diffalign.runtime.step_metrics import reduce_step
from diffalign.runtime.tracking import SAVE, MetricsLog, Trackers, pictures_of

logger = get_logger(__name__)

B = TypeVar("B", bound=IterationBatch)


class Loop(Generic[B]):
    """Train an algorithm's module to ``max_train_steps``.

    Attributes:
        batch: Data of the iteration in progress; None between two iterations.
        phase: "evaluate", "sample" or "update": whose batch size to halve when memory runs out; "close" after an
            optimizer step, which is not repeated.
    """

    def __init__(
        self,
        run: Run,
        state: LoopState,
        algorithm: LoopAlgorithm[B],
        outputs: RunOutputs,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.run, self.state, self.algorithm, self.outputs = run, state, algorithm, outputs
        self.callbacks = Callbacks(run, callbacks)
        self.config, self.accelerator, self.progress = run.config, run.accelerator, state.progress
        self.checkpointer = Checkpointer(run, state, algorithm, outputs)
        self.batch: B | None = None
        self.phase = "evaluate"
        self.time_left = TimeLeft()
        self._log_file = contextlib.ExitStack()  # opened once the run folder is prepared
        self.stop_agreed = False  # all processes know of a signal
        self.applying = False  # a step is taken, but not logged and counted: no checkpoint may be written
        self.first_outputs: list[Tensor] = []  # of the denoiser, from before the first update
        self.evaluated_here = False  # whether this process has run an evaluation, whose images the report needs

    # The run --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from the start or from a checkpoint.

        Raises:
            Interrupted: A signal stopped the run, which is saved.
            SaveFailed, NotFinite, OutOfMemory: See ``runtime.errors``.
            ValueError: The folder is in use or cannot be written, or the checkpoint belongs to another run.
        """
        lock = claimed(self.config.output_dir) if self.accelerator.is_main_process else contextlib.nullcontext()
        with steady_output(), lock, self.run.heartbeat, self._log_file:
            try:
                if not self._begin():
                    self.callbacks("on_train_end")  # which may upload what an earlier process could not
                    return
                self.callbacks("on_train_begin")
                with self._bar() as bar:
                    while not self._finished(bar):
                        with self._retry_in_smaller_batches():
                            self._iterate(bar)
                self._export()
                self.callbacks("on_train_end")
            except StopRequested:
                self._leave()
            except (NotFinite, SaveFailed, CannotTrain):
                raise  # their checkpoints are written already, or cannot be written
            except Exception as error:
                blame_weights(self.run, self.state, error)
                self._save_before_end()
                raise

    def _iterate(self, bar: tqdm) -> None:
        """Run one iteration of any algorithm; what a checkpoint restored or an earlier attempt finished is kept."""
        algorithm, iteration = self.algorithm, self.progress.iteration
        before, started = self.progress.step, time.perf_counter()

        if self.batch is None:
            self.phase = "sample"
            self.run.heartbeat(collective=True)
            batch = algorithm.sample(iteration)
            algorithm.score(batch)
            algorithm.advantage(batch)
            batch.metrics["time/collect"] = time.perf_counter() - started
            self.batch = batch
        self.phase = "update"
        for minibatch in self._remaining_minibatches(self.batch):
            metrics = self._update(self.batch, minibatch)
            self._close_update(self.batch, metrics, bar)

        self._next_iteration()
        if text := self.time_left.line(self.config, before, self.progress.step, time.perf_counter() - started):
            logger.info(text)

    def _remaining_minibatches(self, batch: B) -> Iterator[MiniBatch]:
        """Yield the iteration's minibatches that have no optimizer step yet, up to ``max_train_steps``."""
        remaining = islice(self.algorithm.minibatches(batch, self.progress.iteration), self.progress.update, None)
        while not self.over and (minibatch := next(remaining, None)) is not None:
            yield minibatch

    def _next_iteration(self) -> None:
        self.progress.iteration, self.progress.update, self.batch = self.progress.iteration + 1, 0, None

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the algorithm or a callback stops early."""
        finished = self.progress.step >= self.config.max_train_steps
        return finished or self.algorithm.done or self.callbacks.agreed.should_training_stop

    def _begin(self) -> bool:
        """Load the checkpoint to resume from and open the logs; return False if the run is already finished."""
        config, step = self.config, self.progress
        if self.accelerator.is_main_process:
            check_products(config.output_dir)
        path = self.checkpointer.find()
        self.batch, rows = (None, None) if path is None else self.checkpointer.restore(path)
        self.checkpointer.take_snapshot()
        self.checkpointer.saved = step.position
        plain = {"tasks": self.checkpointer.snapshot[1], "origin": self.outputs.origin()}
        checkpoint.check_state({**plain, "guard": self.state.guard.state()})

        evaluated = self.over and step.evaluated == step.step
        if path is not None and evaluated and all_exported(self.accelerator, config, step.step):
            logger.info(f"nothing to do: this run has had its {step.step} steps")
            return False
        self.trackers = Trackers(self.accelerator)
        if self.accelerator.is_main_process:
            prepare_folder(config, resumed=path is not None)
            self._log_file.enter_context(log_to_file(config.output_dir))
            noted = None if path is None else self.state.guard.noted
            self.log = MetricsLog(config.output_dir / "metrics.jsonl", rows, step.step, step.evaluated == step.step)
            self.skips = MetricsLog(config.output_dir / "skipped.jsonl", noted, step.step)
            self.trackers.start("diffalign", to_dict(config))
        if path is not None:
            logger.info(f"resumed from {path} at step {step.step}")
        elif config.resume_from_checkpoint:
            logger.info(f"no checkpoint in {config.output_dir}: a fresh start")
        return True

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.max_train_steps,
            initial=self.progress.step,
            desc="train",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def _finished(self, bar: tqdm) -> bool:
        """Evaluate and checkpoint if due at this iteration boundary; return whether the run is over."""
        if self.over and self.progress.update:
            self._next_iteration()  # the rest of the iteration's data is not needed
        with paused(bar):
            self._evaluate_and_save()
        return self.over

    def _evaluate_and_save(self) -> None:
        """Evaluate and save if due, also if an interrupted run has not done so."""
        step = self.progress
        if step.update:
            return
        asked = self.callbacks.take()
        due = step.evaluated < 0 or ((self.over or asked.should_evaluate) and step.evaluated != step.step)
        if due or self._crossed(step.evaluated, self.config.eval_steps):
            self._evaluate()
        last = self.over  # an evaluation may end the run
        due = last or asked.should_save or self._crossed(self.checkpointer.saved[0], self.config.checkpointing_steps)
        if step.step and due and not self.checkpointer.is_current:
            self.save(last)
        if last and not self.evaluated_here:
            self.outputs.evaluate(step.step)  # for its images, which an earlier process held

    def _crossed(self, before: int, every: int) -> bool:
        return crossed(max(0, before), self.progress.step, every)

    @contextlib.contextmanager
    def _retry_in_smaller_batches(self) -> Iterator[None]:
        """Halve the batch size of the phase that ran out of memory; the next iteration continues where it stopped."""
        try:
            with memory_errors():
                yield
        except torch.OutOfMemoryError as error:
            if self.applying or self.phase == "close":  # the step is taken, or its moments are half made
                raise
            logger.info(make_room(self.config, self.phase, self.progress.step, self.run.world, error))
            self.state.optimizer.zero_grad(set_to_none=True)
            if self.phase == "sample":
                self.algorithm.load_state_dict(self.checkpointer.snapshot)

    # One optimizer step ---------------------------------------------------------------------------------------------

    def _update(self, batch: B, minibatch: MiniBatch) -> Metrics:
        """Take one optimizer step, unless the guard refuses it; return its metrics, means over all processes.

        There is one host synchronisation: guard, signals and log read the same transfer.
        """
        started = time.perf_counter()
        if not self.progress.taken:
            self._before_first_update(batch)

        self.state.optimizer.zero_grad(set_to_none=True)  # an interrupted attempt may have left gradients
        passes: list[dict[str, Tensor]] = []
        missing = shortfall(len(minibatch.micros)) if self.state.sharded else 0
        with self.algorithm.updating():
            for micro in minibatch.micros:
                self.run.heartbeat()
                last = micro is minibatch.micros[-1]  # which reduces gradients over processes
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.state.module):
                    loss, metrics = self.algorithm.loss(micro)
                    loss = loss * micro.weight
                    self.accelerator.backward(loss)
                passes.append({"loss": loss.detach() * len(minibatch.micros), **metrics})
            for _ in range(missing):
                self.accelerator.backward(self.algorithm.loss(minibatch.micros[-1])[0] * 0)

        row, reason = self._reduced(passes)
        self.applying = True
        if reason is not None:
            self._note_skipped(reason, row["grad_norm"], batch.ids(minibatch.rows))
        self.state.step(reason, row["grad_norm"])
        row["lr"] = float(self.state.schedule.get_last_lr()[0])
        if reason is not None:
            row["skipped"] = float(self.progress.skipped)
        return {**row, **minibatch.metrics, "time/update": time.perf_counter() - started}

    def _reduced(self, passes: Sequence[dict[str, Tensor]]) -> tuple[Metrics, str | None]:
        """Clip the gradient; return the metrics of the step over all processes, and why to skip it."""
        clipped = self.accelerator.clip_grad_norm_(self.state.parameters, self.config.max_grad_norm)
        norm = full_tensor(torch.as_tensor(clipped))
        asked = (self.run.heartbeat.signals.received is not None, *self.callbacks.asked())
        metrics, reason, (self.stop_agreed, *agreed) = reduce_step(
            self.accelerator, self.state.guard, passes, norm, asked
        )
        self.callbacks.agree(agreed)
        return metrics, reason

    @torch.no_grad()
    def _before_first_update(self, batch: B) -> None:
        """Check that the run is on policy, and keep outputs of the denoiser from before the first update."""
        self.algorithm.on_first_batch(batch)
        self.first_outputs = self.algorithm.probe(batch)

    @torch.no_grad()
    def _after_first_update(self, batch: B) -> None:
        """Raise CannotTrain if the first update left the denoiser's outputs as they were."""
        first, self.first_outputs = self.first_outputs, []
        if all(torch.equal(new, old) for new, old in zip(self.algorithm.probe(batch), first, strict=True)):
            raise CannotTrain(
                "the first update changed nothing in the denoiser's output: the trained weights are not part of it "
                f"(check lora.targets), or learning_rate is too small for this precision{extremes(self.config)}"
            )

    def _close_update(self, batch: B, metrics: Metrics, bar: tqdm) -> None:
        """Log, checkpoint state and stop checks after an optimizer step."""
        failed, self.phase = None, "close"
        try:
            self.algorithm.on_step(batch, metrics)
            if self.progress.taken == 1 and "skipped" not in metrics:
                self._after_first_update(batch)
        except Exception as error:  # the step is taken: log its metrics first
            failed = error
        row = {**batch.metrics, **metrics}
        self._record(row)
        batch.metrics.pop("time/collect", None)  # counted once, however many updates follow

        self.progress.update += 1
        self.checkpointer.take_snapshot()
        self.applying = False
        if failed is not None:
            raise failed
        bar.update()
        bar.set_postfix_str(progress(row))
        if too_many_bad_steps(self.state):
            self.save()
            raise bad_steps(self.run, self.state)
        self.callbacks("on_step_end", metrics=dict(row))
        if self.stop_agreed:
            raise StopRequested
        self.phase = "update"

    def _note_skipped(self, reason: str, norm: float, own: list[dict[str, object]]) -> None:
        """Write the data to reproduce a skipped step to ``skipped.jsonl``; ``own`` are this process's samples."""
        samples = gather_object(own) if self.accelerator.num_processes > 1 else own
        if self.accelerator.is_main_process and reason != "no gradient":
            step = self.progress
            where = {"iteration": step.iteration, "update": step.update, "seed": self.config.seed}
            row = {"reason": reason, "grad_norm": norm, **where, "samples": samples}
            self.skips.write(step.step + 1, row)
            logger.info(f"step {step.step + 1} is not taken: {reason} (norm {norm:.3g}); samples are in skipped.jsonl")

    # Outputs --------------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        started, found = time.perf_counter(), None
        self.phase = "evaluate"
        while found is None:
            with self._retry_in_smaller_batches():
                found = self.outputs.evaluate(self.progress.step)
        figures = {f"eval/{name}": value for name, value in found.items()}
        self._record(figures)
        self.trackers.pictures(self.outputs.pictures, self.progress.step)
        self.time_left.evaluation = time.perf_counter() - started if found else 0.0
        self.progress.evaluated, self.evaluated_here = self.progress.step, True
        self.checkpointer.take_snapshot()  # an evaluation may change it
        self.callbacks("on_evaluate", metrics=figures)

    def _record(self, metrics: Metrics) -> None:
        if self.accelerator.is_main_process:
            metrics = {**metrics, **self.outputs.watch(self.progress.step, metrics)}
            self.log.write(self.progress.step, metrics)
            self.trackers.log(metrics, self.progress.step)

    def save(self, last: bool = False) -> Path | None:
        """Write a checkpoint; see ``Checkpointer.save``."""
        self.run.heartbeat.watchdog.beat()
        started = time.perf_counter()
        rows = self.log.rows if self.accelerator.is_main_process else 0
        if (path := self.checkpointer.save(self.batch, rows, last)) is not None:
            self._record({SAVE: time.perf_counter() - started})
            self.log.sync()
            self.callbacks("on_save", path=path)
        return path

    # End of the run -------------------------------------------------------------------------------------------------

    def _export(self) -> None:
        """Write the exports of the run, and last the manifest with their checksums."""
        self.run.heartbeat.watchdog.beat()
        folder = self.config.output_dir
        try:
            written = self.outputs.finish()
            if self.accelerator.is_main_process and written is not None:
                write_exports(folder, self.progress.step, written)
                self.trackers.pictures(lambda: pictures_of(written), self.progress.step)
        except (OSError, SafetensorError) as error:
            raise SaveFailed(
                f"the exports in {folder} could not be written ({str(error)[:300]}): free space on the disk and start "
                f"the same run again; it exports from {last_good(self.config)}"
            ) from error
        self.trackers.finish()

    def _leave(self) -> NoReturn:
        """Save the last whole optimizer step, print the command that resumes, and raise Interrupted."""
        self.state.optimizer.zero_grad(set_to_none=True)
        if not self.checkpointer.is_current or not self.progress.step:
            self.save(last=True)
        logger.info(f"stopped at step {self.progress.step}; go on with:\n  {self.outputs.resume_command}")
        self.trackers.finish()
        raise Interrupted(self.run.heartbeat.signals.received or signal.SIGTERM)

    def _save_before_end(self) -> None:
        """Save finished steps before an error ends a run of one process; several may be at different points."""
        step = self.progress.step
        if self.run.world > 1 or self.applying or not step or self.checkpointer.is_current:
            return
        with contextlib.suppress(Exception):  # must not hide the error that ends the run
            self.state.optimizer.zero_grad(set_to_none=True)
            logger.info(f"step {step} is saved before the run ends: {self.save()}")
