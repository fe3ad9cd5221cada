"""Shared objects of a training: configuration, model, processes, random numbers, prompt embeddings, progress."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign.models import DiffusionModel
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rng import KeyedRNG
from diffalign.runtime import checkpoint
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import NotFinite, StopRequested
from diffalign.runtime.signals import Signals
from diffalign.runtime.trainer_config import TrainerConfig
from diffalign.runtime.watchdog import Watchdog
from diffalign.runtime.working_folder import return_to
from diffalign.structures import Guidance

C = TypeVar("C", bound=TrainingConfig, covariant=True)
D = TypeVar("D", bound=TrainerConfig, covariant=True)


@dataclass
class Progress:
    """Counters of a run; the loop writes them.

    Attributes:
        step: Optimizer steps taken or skipped.
        skipped: Steps that the gradient guard skipped.
        iteration: Iterations finished.
        update: Optimizer steps finished within the current iteration.
        evaluated: The step of the last evaluation; -1 before the first.
    """

    step: int = 0
    skipped: int = 0
    iteration: int = 0
    update: int = 0
    evaluated: int = -1

    @property
    def taken(self) -> int:
        """Optimizer steps taken and not skipped."""
        return self.step - self.skipped

    @property
    def position(self) -> tuple[int, int, int]:
        """Return (step, update, evaluated), which differs between any two checkpoints."""
        return self.step, self.update, self.evaluated


class Heartbeat:
    """Re-arm the watchdog between two micro-batches, and stop the run if a signal came.

    As a context it handles signals and watches for hangs. Call it often: nothing else stops a run.
    """

    def __init__(self, accelerator: Accelerator, watchdog: Watchdog) -> None:
        self.accelerator, self.watchdog, self.signals = accelerator, watchdog, Signals()
        self.working_folder = os.getcwd()

    def __enter__(self) -> Heartbeat:
        with ExitStack() as stack:
            stack.enter_context(self.signals)
            stack.enter_context(self.watchdog)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def __call__(self, collective: bool = False) -> None:
        """Note progress; raise StopRequested if a signal came.

        Args:
            collective: Whether all processes make this call equally often. Several processes can stop only there.
        """
        self.watchdog.beat()
        return_to(self.working_folder)
        stop = self.signals.received is not None
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(float(stop), device=self.accelerator.device)
            stop = collective and self.accelerator.reduce(mine).item() > 0
        if stop:
            raise StopRequested


class BaseRun(Generic[C]):
    """What the loop reads of a training, whatever model it trains; subclasses are frozen dataclasses of these fields.

    Attributes:
        config: The validated configuration.
        model: The model, with its trained weights.
        module: The trained module as the loop calls it, wrapped for several processes.
        accelerator: Processes and devices.
        rng: Keyed random numbers.
        progress: Counters, which only the loop changes.
        heartbeat: Call it between two micro-batches.
    """

    config: C
    model: Any
    module: nn.Module
    accelerator: Accelerator
    rng: KeyedRNG
    progress: Progress
    heartbeat: Heartbeat

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return bool(self.accelerator.is_main_process)

    @property
    def rank(self) -> int:
        """Index of this process."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    def share(self, total: int) -> range:
        """Return this process's consecutive share of ``total`` indices, which the number of processes divides."""
        size = total // self.world
        return range(size * self.rank, size * (self.rank + 1))

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate the rows of all processes, in the order of processes; return them on the CPU."""
        return torch.as_tensor(self.accelerator.gather(x.to(self.accelerator.device))).cpu()

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """Concatenate lists of all processes, in the order of processes."""
        return gather_object(objects) if self.world > 1 else objects


@dataclass(frozen=True)
class Run(BaseRun[D]):
    """Shared objects of a training, passed to algorithm, loop and outputs, none of which it refers to.

    Attributes besides those of ``BaseRun``:
        model: The diffusion model, with its trained weights.
        prompts: Prompt embeddings.
    """

    config: D
    model: DiffusionModel
    module: nn.Module
    accelerator: Accelerator
    rng: KeyedRNG
    prompts: PromptEmbeddingCache
    progress: Progress
    heartbeat: Heartbeat

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of every sampling, as the model's pipeline defines it."""
        scale = self.config.guidance_scale
        return self.model.unguided_scale if scale is None else scale

    @property
    def guidance(self) -> Guidance:
        """Guidance of every sampling."""
        return self.prompts.guidance(self.guidance_scale)

    def diverged(self, what: str) -> NotFinite:
        """Return the error for images or losses that are not finite although no step was skipped."""
        taken = self.progress.taken
        if not taken:
            text = f"{what} before the first update: lower guidance_scale, or set mixed_precision: no"
        else:
            text = f"{what} after {taken} updates: the model has diverged; lower learning_rate"
        return NotFinite(f"{text}; last good checkpoint: {last_good(self.config)}{extremes(self.config)}")


def last_good(config: Any) -> str:
    """Return the path of the newest valid checkpoint of a run folder, for messages."""
    return str(checkpoint.latest(config.output_dir) or "none")
