"""The one loop: backward, gradient guard, optimizer, EMA, logging, checkpoints and evaluations, for every trainer.

It knows disks and processes and no algorithm. A task says what an iteration collects and yields the losses of each
optimizer step, a micro-batch at a time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.config import to_dict
from diffalign.runtime import checkpoint
from diffalign.runtime.ema import EMA
from diffalign.runtime.optimizers import make_optimizer
from diffalign.runtime.settings import TrainingConfig
from diffalign.runtime.tracking import MetricsLog, Trackers

Metrics = dict[str, float]
Micro = Callable[[], tuple[Tensor, dict[str, Tensor]]]


class Task(Protocol):
    """What a trainer gives to the loop."""

    updates_per_iteration: int

    def collect(self, iteration: int) -> Metrics:
        """Prepares the data of an iteration; returns what to log of it."""

    def updates(self, iteration: int) -> Iterator[Sequence[Micro]]:
        """Per optimizer step, its micro-batches: each a call that returns a loss, already weighted, and metrics."""

    def evaluate(self, step: int) -> Metrics:
        """Figures of the averaged weights where there are any, else of the policy."""

    def before_first_update(self) -> None:
        """Checks that must hold when the weights have not moved yet; raises where they do not."""

    def after_first_update(self) -> None:
        """Checks that must hold once they have."""

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Follows optimizer step number ``step`` (from 1), with its figures over all processes."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold besides weights, optimizer and counters: tensors, and what JSON can hold."""

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""

    def export(self, folder: Path) -> None:
        """Writes into a checkpoint what other programs load: the LoRA as it is now."""

    def finish(self) -> None:
        """Writes the results of the run."""


class Loop:
    """Runs a task on a module's trainable parameters."""

    def __init__(self, task: Task, module: nn.Module, args: TrainingConfig, accelerator: Accelerator) -> None:
        self.task, self.args, self.accelerator = task, args, accelerator
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.parameters = parameters
        optimizer = make_optimizer(parameters, args)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: lr_factor(args.lr_scheduler, k, args.lr_warmup_steps, args.max_train_steps)
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.ema = EMA(parameters, args.ema_decay) if args.ema_decay else None
        self.step = 0
        self.skipped = 0

    @property
    def iteration(self) -> int:
        """The iteration that begins next."""
        return -(-self.step // self.task.updates_per_iteration)

    # The run --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to ``max_train_steps``, from the beginning or from a checkpoint."""
        resumed = self._resume()
        if self.step >= self.args.max_train_steps:
            self._say(f"nothing to do: this run has had its {self.step} steps")
            return
        self.trackers = Trackers(self.accelerator)
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.args.output_dir)
            self.log = MetricsLog(self.args.output_dir / "metrics.jsonl", resume_step=self.step if resumed else None)
            self.trackers.start("diffalign", to_dict(self.args))
        if not resumed:
            self._evaluate()
        bar = tqdm(total=self.args.max_train_steps, initial=self.step, desc="train",
                   disable=not self.accelerator.is_main_process, dynamic_ncols=True)  # fmt: skip
        while self.step < self.args.max_train_steps:
            self._iterate(bar)
        bar.close()
        self.task.finish()
        self.trackers.finish()

    def _iterate(self, bar: tqdm) -> None:
        begun, before = time.perf_counter(), self.step
        collected = self.task.collect(self.iteration)
        collected["time/collect"] = time.perf_counter() - begun
        for micros in self.task.updates(self.iteration):
            if self.step == self.args.max_train_steps:
                break
            started = time.perf_counter()
            if self.step == 0:
                self.task.before_first_update()
            metrics = self._update(micros)
            self.task.after_update(self.step, metrics)
            if self.step == 1:
                self.task.after_first_update()
            metrics["time/update"] = time.perf_counter() - started
            self._record({**collected, **metrics})
            collected.pop("time/collect", None)  # counted once, however many updates follow
            bar.update()
            bar.set_postfix_str(progress({**collected, **metrics}))
        last = self.step >= self.args.max_train_steps
        if last or crossed(before, self.step, self.args.eval_steps):
            self._evaluate()
        if last or crossed(before, self.step, self.args.checkpointing_steps):
            self.save()

    def _update(self, micros: Sequence[Micro]) -> Metrics:
        """One optimizer step. Gradients of all micro-batches add up; processes synchronise at the last one."""
        collected: list[dict[str, Tensor]] = []
        for index, micro in enumerate(micros):
            last = index == len(micros) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, metrics = micro()
                self.accelerator.backward(loss)
            collected.append({"loss": loss.detach() * len(micros), **metrics})
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        names = collected[0]
        means = torch.stack([torch.stack([c[name].float() for c in collected]).mean() for name in names])
        # One synchronisation per optimizer step: the guard needs a number, and the log takes its figures with it.
        *values, norm = torch.cat(
            [self.accelerator.reduce(means, "mean"), torch.as_tensor(norm)[None].to(means)]
        ).tolist()
        self._apply(torch.isfinite(torch.tensor([norm, values[0]])).all().item())
        return {**dict(zip(names, values, strict=True)), "grad_norm": norm, "lr": self.schedule.get_last_lr()[0]}

    def _apply(self, finite: bool) -> None:
        """Steps the optimizer, or leaves every weight and moment as it is when loss or gradient is not finite.

        Under fp16 the loss scaler decides by itself, and needs to see overflows.
        """
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()
            self.skipped = 0 if finite else self.skipped
            if self.ema is not None and finite:
                self.ema.update()
        else:
            self.skipped += 1
            self._say(f"step {self.step}: loss or gradient is not finite, the weights stay as they are")
        if self.skipped == 3:
            raise FloatingPointError("three steps in a row were not finite: lower learning_rate, or train in float32")
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1

    # What it writes -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        self._record({f"eval/{name}": value for name, value in self.task.evaluate(self.step).items()})

    def _record(self, metrics: Metrics) -> None:
        if self.accelerator.is_main_process:
            self.log.write(self.step, metrics)
            self.trackers.log(metrics, self.step)

    def save(self) -> Path | None:
        """Writes ``checkpoint-<step>/``: weights, EMA, optimizer, schedule, loss scaler, counters."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return None
        moments, optimizer = checkpoint.flatten_optimizer(self.optimizer.optimizer)
        own_tensors, own_state = self.task.state()
        tensors = {"weights": indexed(self.parameters), "optimizer": moments}
        tensors |= {"task": own_tensors} if own_tensors else {}
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "task": own_state,
        }
        if self.ema is not None:
            tensors["ema"] = indexed(self.ema.shadow)
            state["ema_updates"] = self.ema.updates
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return checkpoint.save(
            self.args.output_dir,
            self.step,
            tensors,
            state,
            keep=self.args.checkpoints_total_limit,
            export=self.task.export,
        )

    def _resume(self) -> bool:
        path = checkpoint.resolve(self.args.output_dir, self.args.resume_from_checkpoint)
        if path is None:
            if self.args.resume_from_checkpoint:
                self._say(f"no checkpoint in {self.args.output_dir}: a fresh start")
            return False
        tensors, state = checkpoint.load(path)
        with torch.no_grad():
            restore(self.parameters, tensors["weights"])
            if self.ema is not None:
                restore(self.ema.shadow, tensors["ema"])
                self.ema.updates = state["ema_updates"]
        checkpoint.restore_optimizer(self.optimizer.optimizer, tensors["optimizer"], state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.task.restore(tensors.get("task", {}), state["task"])
        self._say(f"resumed from {path} at step {self.step}")
        return True

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)


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


def indexed(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors by position, as safetensors wants them: named."""
    return {f"{index:05d}": tensor.detach() for index, tensor in enumerate(tensors)}


def restore(tensors: Sequence[Tensor], stored: dict[str, Tensor]) -> None:
    """Copies back what ``indexed`` named. ValueError where the number of tensors differs."""
    if len(tensors) != len(stored):
        raise ValueError(
            f"the checkpoint holds {len(stored)} tensors, this run trains {len(tensors)}: use its config.yaml"
        )
    for index, tensor in enumerate(tensors):
        tensor.copy_(stored[f"{index:05d}"])


def progress(metrics: Metrics) -> str:
    """The figures worth a place beside the progress bar."""
    shown = {"reward": "reward/mean", "acc": "accuracy", "clip": "clip_share", "kl": "kl", "img/s": "images_per_second"}
    return " ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items() if name in metrics)
