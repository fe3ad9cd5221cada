"""Benchmark an iteration of forward-process RL, and its ratio to the bare cost of its model evaluations.

    python scripts/bench/forward_rl.py                            # NFT on the embedded world
    python scripts/bench/forward_rl.py --preset dgpo --repeats 9  # any run; fields as for training

The bare cost is that of the forward passes, the forward and backward passes, optimizer steps, decoding and scoring of
an iteration, each measured alone at the same shapes and threads, times the evaluations that the iteration was seen to
run. Iterations and bare parts alternate, and medians are compared. On a CPU all times are core-seconds of the process,
which other work on the machine hardly changes. Writes ``assets/results/bench_forward_rl.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign import ForwardRLConfig, ForwardRLTrainer
from diffalign.config import parse
from diffalign.rollout.generate import decode
from diffalign.rollout.sampler import micro_batches
from diffalign.rollout.scoring import score
from scripts import ROOT
from scripts.bench.flow_grpo import collect, compared, device, optimizer_step, peak_memory

SAMPLING, COMPARING, TRAINING = "sampling forward", "comparing forward", "training forward and backward"


class Bench:
    """Time a trainer's iterations, and the parts that every implementation needs."""

    def __init__(self, trainer: ForwardRLTrainer) -> None:
        self.trainer, self.args = trainer, trainer.args
        self.images = self.args.num_groups * self.args.group_size
        self.iteration, self.sampling = 0, False
        self.counts: Counter[str] = Counter()
        trainer.model.raw_denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        self.whole()  # a first iteration warms everything up
        torch.manual_seed(0)
        self.pixels = decode(trainer.model, self.batch.buffer.latents(self.batch.buffer.leaves))

    def whole(self) -> dict[str, float]:
        """Seconds of an iteration's phases, its prompts encoded before: a run does that once for each of them."""
        trainer = self.trainer
        trainer.run.prompts([prompt.text for prompt in trainer.algorithm.collector.prompts_of(self.iteration)])
        self.counts.clear()
        started, self.sampling = self.now(), True
        batch = self.batch = collect(trainer, self.iteration)
        collected, self.sampling = self.now(), False
        for minibatch in trainer.algorithm.minibatches(batch, self.iteration):
            metrics = trainer.loop._update(batch, minibatch)
            trainer.algorithm.on_step(batch, metrics)
        ended = self.now()
        self.iteration += 1
        self.evaluations = dict(self.counts)
        return {"collect": collected - started, "update": ended - collected}

    def bare(self) -> dict[str, float]:
        """Time each part alone, multiplied by its count per iteration."""
        args, seen = self.args, self.evaluations
        rollout, pairs = min(args.rollout_batch_size, self.images), min(args.train_batch_size, self.images)
        batches = len(micro_batches(self.images, rollout))
        parts: dict[str, tuple[Callable[[], object], float]] = {
            SAMPLING: (lambda: self._forward(rollout), seen[SAMPLING] / rollout),
            COMPARING: (lambda: self._forward(pairs), seen.get(COMPARING, 0) / pairs),
            TRAINING: (lambda: self._backward(pairs), seen[TRAINING] / pairs),
            "optimizer": (lambda: optimizer_step(self.trainer), args.updates_per_rollout),
            "decoding": (lambda: decode(self.trainer.model, self._latents(rollout), args.decode_dtype), batches),
            "scoring": (lambda: self._score(rollout), batches),
        }
        result = {}
        for name, (call, times) in parts.items():
            started = self.now()
            if times:
                call()
            result[name] = (self.now() - started) * times
        return result

    def now(self) -> float:
        """Return seconds: of all cores on a CPU, else of the clock."""
        if self.trainer.run.accelerator.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = SAMPLING if self.sampling else TRAINING if torch.is_grad_enabled() else COMPARING
        self.counts[name] += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def _latents(self, count: int) -> torch.Tensor:
        return self.batch.buffer.latents(self.batch.buffer.leaves[:count])

    def _predict(self, count: int) -> torch.Tensor:
        batch, level = self.batch, self.trainer.algorithm.collector.levels[1]
        conditioning = batch.conditioning[batch.buffer.group[batch.buffer.leaves[:count]]]
        return self.trainer.model.predict(self._latents(count), level, conditioning)

    @torch.no_grad()
    def _forward(self, count: int) -> None:
        self._predict(count)

    def _backward(self, count: int) -> None:
        self.trainer.run.accelerator.backward(self._predict(count).square().mean())

    def _score(self, count: int) -> None:
        trainer, batch = self.trainer, self.batch
        group = batch.buffer.group[batch.buffer.leaves[:count]].tolist()
        score(trainer.inputs.rewards, self.pixels[:count], [batch.buffer.prompts[g] for g in group])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/forward_rl/shapes.yaml")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_forward_rl.json")
    own, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        args = parse(ForwardRLConfig, ["--config", str(own.config), *overrides, "--output_dir", folder])
        bench = Bench(ForwardRLTrainer(args=args))
        found = compared(bench, own.repeats)
    result = {
        "config": own.config.name,
        "overrides": overrides,
        "device": device(),
        **found,
        "images_per_second": bench.images / found["seconds_per_iteration"],
        "evaluations_per_image": {name: count / bench.images for name, count in bench.evaluations.items()},
        "peak_memory_gib": peak_memory(),
    }
    own.write.parent.mkdir(parents=True, exist_ok=True)
    own.write.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
