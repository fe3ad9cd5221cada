"""A task that learns a matrix: everything that the loop asks for, a millisecond a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from diffalign.rng import KeyedRNG
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.interfaces import MicroBatch, MiniBatch

Hook = Callable[[str, "NullTask"], None]


class NullTask:
    """Two updates per iteration, each of two micro-batches, on data that the weights of its beginning made.

    hook: called with the name of each phase, "collect", "reward", "backward", "evaluate", "save" and "finish", before
    it begins; what it does is the fault.
    """

    updates_per_iteration, done, data_digest, resume_command = 2, False, "null", "python null.py"
    world_size_invariant, commits, contents = False, MappingProxyType({}), MappingProxyType({})

    def __init__(self, args: TrainingConfig, hook: Hook | None = None, width: int = 8) -> None:
        self.hook = hook or (lambda phase, task: None)
        self.noise, self.width, self.args = KeyedRNG(args.seed), width, args
        module = nn.Linear(width, width, bias=False)
        nn.init.eye_(module.weight)
        self.loop = Loop(self, module, args, Accelerator(cpu=True))
        self.total = 0.0

    @property
    def share(self) -> slice:
        """The rows of this process."""
        rank, world = self.loop.run.accelerator.process_index, self.loop.run.accelerator.num_processes
        return slice(8 * rank // world, 8 * (rank + 1) // world)

    def collect(self, iteration: int) -> dict[str, float]:
        x = self.noise.normal((8, self.width), "x", iteration)[self.share]
        made = []
        for part in x.split(2):
            self.hook("collect", self)
            self.loop.run.heartbeat(together=True)
            with torch.no_grad():
                made.append(self.loop.state.module(part).tanh())
            self.hook("reward", self)
            self.loop.run.heartbeat(together=True)
        self.x, self.y = x, torch.cat(made)
        return {"reward/mean": self.y.mean().item()}

    def minibatches(self, iteration: int):
        order = self.noise.permutation(len(self.x), "order", iteration)
        for part in order.chunk(2):
            yield MiniBatch([MicroBatch(rows, 1 / 2) for rows in part.chunk(2)], part)

    def loss(self, micro):
        self.hook("backward", self)
        error = self.loop.state.module(self.x[micro.rows]) - self.y[micro.rows] - 0.1
        return error.square().mean(), {"error": error.detach().abs().mean()}

    def updating(self):
        return contextlib.nullcontext()

    def ids(self, minibatch):
        return [{"rank": self.loop.run.accelerator.process_index}]

    def collected(self):
        return {"x": self.x, "y": self.y}

    def recollect(self, iteration, tensors):
        self.x, self.y = tensors["x"][self.share].clone(), tensors["y"][self.share].clone()

    def evaluate(self, step):
        self.hook("evaluate", self)
        self.loop.run.heartbeat()
        return {"accuracy": self.loop.state.parameters[0].sum().item()}

    def before_first_update(self):
        assert self.loop.progress.taken == 0

    def after_first_update(self):
        assert self.loop.progress.taken == 1

    def after_update(self, step, metrics):
        self.total += metrics["loss"]

    def state(self):
        return {}, {"total": self.total if self.total == self.total else None}

    def restore(self, tensors, plain):
        self.total = plain["total"]

    def exporter(self):
        return self._export

    def _export(self, folder: Path) -> None:
        self.hook("save", self)
        save_file({"w": self.loop.state.parameters[0].detach().clone()}, folder / "product.safetensors")

    def finish(self):
        self.hook("finish", self)
        (self.args.output_dir / "done.txt").write_text(f"{self.loop.progress.step}")
        return [self.args.output_dir / "done.txt"]


def settings(folder: Path, **changes) -> TrainingConfig:
    """A run of eight steps with an EMA and a schedule, saved at every fourth."""
    common = {"max_train_steps": 8, "checkpointing_steps": 4, "eval_steps": 4, "ema_decay": 0.9}
    common |= {"learning_rate": 0.01, "lr_scheduler": "cosine", "resume_from_checkpoint": "latest"}
    return TrainingConfig(output_dir=Path(folder), **(common | changes))


def run(folder: Path, hook: Hook | None = None, width: int = 8, **changes) -> NullTask:
    """Runs it to its end, or to its fault."""
    task = NullTask(settings(folder, **changes), hook, width)
    task.loop.train()
    return task
