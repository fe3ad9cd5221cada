"""A run that learns a matrix: everything that the loop asks for, a millisecond a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.rng import KeyedRNG
from diffalign.runtime.callbacks import TrainerCallback
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.interfaces import IterationBatch, MicroBatch, MiniBatch
from diffalign.runtime.loop import Loop
from diffalign.runtime.provenance import origin
from diffalign.runtime.run import Heartbeat, Run
from diffalign.runtime.state import LoopState
from diffalign.runtime.watchdog import Watchdog

ROWS = 8
Hook = Callable[[str, "NullTrainer"], None]


class NullTrainer:
    """A loop with the null algorithm.

    Attributes:
        hook: Called with the name of each phase, "sample", "score", "backward", "evaluate", "save" and "finish",
            before it begins; what it does is the fault.
    """

    def __init__(
        self,
        config: TrainingConfig,
        hook: Hook | None = None,
        width: int = 8,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.hook = hook or (lambda phase, trainer: None)
        config = replace(config, output_dir=config.output_dir.absolute())  # as every trainer does
        module = nn.Linear(width, width, bias=False)
        nn.init.eye_(module.weight)
        accelerator = Accelerator(cpu=True)
        state = LoopState(module, config, accelerator)
        heartbeat = Heartbeat(accelerator, Watchdog(config.hang_timeout, config.output_dir))
        rng, unused = KeyedRNG(config.seed), None
        self.run: Run[Any] = Run(config, unused, state.module, accelerator, rng, unused, state.progress, heartbeat)
        self.algorithm = NullAlgorithm(self.run, self._enter, width)
        self.outputs = NullOutputs(self.run, state, self._enter)
        self.loop = Loop(self.run, state, self.algorithm, self.outputs, callbacks)

    def _enter(self, phase: str) -> None:
        self.hook(phase, self)


@dataclass
class NullBatch(IterationBatch):
    """This process's inputs, and what the weights of the start of the iteration made of them."""

    x: Tensor
    y: Tensor
    rank: int

    def state_dict(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    def ids(self, rows: Tensor) -> list[dict[str, Any]]:
        return [{"rank": self.rank}]


class NullAlgorithm:
    """Two optimizer steps per iteration, each of two micro-batches, on data that the weights of its start made."""

    updates_per_iteration, world_size_invariant, done = 2, False, False

    def __init__(self, run: Run[Any], enter: Callable[[str], None], width: int) -> None:
        self.run, self.enter, self.width = run, enter, width
        self.total = 0.0

    def sample(self, iteration: int) -> NullBatch:
        share = self.run.share(ROWS)
        x, made = self.run.rng.normal((ROWS, self.width), "x", iteration)[share.start : share.stop], []
        for part in x.split(2):
            self.enter("sample")
            self.run.heartbeat(collective=True)
            with torch.no_grad():
                made.append(self.run.module(part).tanh())
        return NullBatch(x, torch.cat(made), self.run.rank)

    def score(self, batch: NullBatch) -> None:
        for _ in batch.x.split(2):
            self.enter("score")
            self.run.heartbeat(collective=True)

    def advantage(self, batch: NullBatch) -> None:
        batch.metrics["reward/mean"] = batch.y.mean().item()

    def minibatches(self, batch: NullBatch, iteration: int) -> Iterator[MiniBatch]:
        order = self.run.rng.permutation(len(batch.x), "order", iteration)
        for part in order.chunk(2):
            yield MiniBatch([MicroBatch(rows, 1 / 2, batch) for rows in part.chunk(2)], part)

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.enter("backward")
        error = self.run.module(micro.data.x[micro.rows]) - micro.data.y[micro.rows] - 0.1
        return error.square().mean(), {"error": error.detach().abs().mean()}

    def updating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def probe(self, batch: NullBatch) -> list[Tensor]:
        return [self.run.module(batch.x[:1])]

    def on_first_batch(self, batch: NullBatch) -> None:
        assert self.run.progress.taken == 0

    def on_step(self, batch: NullBatch, metrics: dict[str, float]) -> None:
        self.total += metrics["loss"]

    def restored(self, iteration: int, tensors: dict[str, Tensor], metrics: dict[str, float]) -> NullBatch:
        share = self.run.share(ROWS)
        x, y = (tensors[name][share.start : share.stop].clone() for name in ("x", "y"))
        return NullBatch(x, y, self.run.rank, metrics=metrics)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"total": self.total if self.total == self.total else None}

    def load_state_dict(self, state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        self.total = state[1]["total"]


class NullOutputs:
    """An evaluation of one number, and a file of weights."""

    resume_command = "python null.py"

    def __init__(self, run: Run[Any], state: LoopState, enter: Callable[[str], None]) -> None:
        self.run, self.state, self.enter = run, state, enter

    def origin(self) -> dict[str, Any]:
        return origin(self.run.config, "null", self.run.world, "cpu", {}, {})

    def evaluate(self, step: int) -> dict[str, float]:
        self.enter("evaluate")
        self.run.heartbeat()
        return {"accuracy": self.state.parameters[0].sum().item()}

    def watch(self, step: int, row: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def exporter(self) -> Callable[[Path], object]:
        return self._export

    def _export(self, folder: Path) -> None:
        self.enter("save")
        save_file({"w": self.state.parameters[0].detach().clone()}, folder / "product.safetensors")

    def finish(self) -> list[Path]:
        self.enter("finish")
        path = self.run.config.output_dir / "done.txt"
        path.write_text(f"{self.run.progress.step}")
        return [path]


def settings(folder: Path, **changes) -> TrainingConfig:
    """A run of eight steps with an EMA and a schedule, saved at every fourth."""
    common = {"max_train_steps": 8, "checkpointing_steps": 4, "eval_steps": 4, "ema_decay": 0.9}
    common |= {"learning_rate": 0.01, "lr_scheduler": "cosine", "resume_from_checkpoint": "latest"}
    return TrainingConfig(output_dir=Path(folder), **(common | changes))


def run(folder: Path, hook: Hook | None = None, width: int = 8, **changes) -> NullTrainer:
    """Train to the end, or to the fault."""
    trainer = NullTrainer(settings(folder, **changes), hook, width)
    trainer.loop.train()
    return trainer
