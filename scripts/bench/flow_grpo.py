"""Benchmark a Flow-GRPO iteration by phase, and its ratio to the bare cost of its model evaluations.

    python scripts/bench/flow_grpo.py                                  # the quickstart
    python scripts/bench/flow_grpo.py --config my.yaml --repeats 9     # any run; fields as for training

The bare cost is that of the forward and backward passes, optimizer steps, decoding and scoring of an iteration, each
measured alone at the same shapes and threads. Iterations and bare parts alternate, and medians are compared, so that a
busy machine slows both. Writes ``assets/results/bench_flow_grpo.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign import FlowGRPOConfig, FlowGRPOTrainer
from diffalign.cli import use_all_cores
from diffalign.config import parse
from diffalign.models.weights import REFERENCE
from diffalign.rollout.generate import decode, shared_steps
from diffalign.rollout.sampler import micro_batches
from diffalign.rollout.scoring import score
from diffalign.trainers.base import Trainer
from scripts import ROOT


class Bench:
    """Time a trainer's iterations, and the parts that every implementation needs."""

    def __init__(self, trainer: FlowGRPOTrainer) -> None:
        self.trainer, self.args = trainer, trainer.args
        self.images = self.args.num_groups * self.args.group_size // trainer.run.accelerator.num_processes
        self.iteration = 0
        self.encoding: list[float] = []
        self.sampled: list[float] = []
        self.taught: list[float] = []
        self.whole()  # a first iteration fills the buffer and warms everything up
        self.steps = self.batch.plan.plan.trained_steps
        torch.manual_seed(0)
        self.pixels = decode(trainer.model, self.batch.buffer.latents(self.batch.buffer.leaves))

    def whole(self) -> dict[str, float]:
        """Seconds of an iteration's phases, its prompts encoded before: a run does that once for each of them."""
        texts = [prompt.text for prompt in self.trainer.algorithm.collector.prompts_of(self.iteration)]
        started = self._now()
        self.trainer.run.prompts(texts)
        self.encoding.append((self._now() - started) / len(texts))
        started = self._now()
        batch = self.batch = collect(self.trainer, self.iteration)
        collected = self._now()
        for minibatch in self.trainer.algorithm.minibatches(batch, self.iteration):
            self.trainer.loop._update(batch, minibatch)
        self.iteration += 1
        return {"collect": collected - started, "update": self._now() - collected}

    def bare(self) -> dict[str, float]:
        """Time each part alone, multiplied by its count per iteration."""
        args, trainer = self.args, self.trainer
        rollout = [len(range(self.images)[rows]) for rows in micro_batches(self.images, args.rollout_batch_size)]
        taught = len(trainer.algorithm.rebalanced(self.batch, torch.arange(self.images))[1])
        self.sampled.append(self._sampling_steps())
        self.taught.append(taught / self.images)
        training = [len(range(taught)[rows]) for rows in micro_batches(taught, args.train_batch_size)]
        parts: dict[str, tuple[Callable[[], object], float]] = {
            "sampling forward": (lambda: self._forward(rollout[0]), self._sampling_steps()),
            "training forward and backward": (lambda: self._backward(training[0]), len(self.steps)),
            "optimizer": (self._optimizer, args.updates_per_rollout),
            "decoding": (lambda: decode(trainer.model, self._latents(rollout[0]), args.decode_dtype), 1),
            "scoring": (lambda: self._score(rollout[0]), 1),
        }
        if args.kl_beta > 0:
            parts["reference forward"] = (lambda: self._reference(training[0]), len(self.steps))
        batches = {"training forward and backward": training, "reference forward": training}
        result = {}
        for name, (call, times) in parts.items():
            sizes = [1] if name == "optimizer" else batches.get(name, rollout)
            started = self._now()
            call()
            result[name] = (self._now() - started) * times * sum(sizes) / sizes[0]
        return result

    def _sampling_steps(self) -> float:
        """Steps per image; those that a group shares count once per group."""
        shared = shared_steps(self.batch.plan.plan) if self.args.shared_start else 0
        return len(self.batch.plan.plan) - shared + shared / self.args.group_size

    def _now(self) -> float:
        if self.trainer.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _latents(self, count: int) -> torch.Tensor:
        return self.batch.buffer.latents(self.batch.buffer.leaves[:count])

    def _predict(self, count: int) -> torch.Tensor:
        trainer, batch, level = self.trainer, self.batch, self.trainer.algorithm.levels[self.steps[0]]
        conditioning = batch.conditioning[batch.buffer.group[batch.buffer.leaves[:count]]]
        return trainer.model.predict(self._latents(count), level, conditioning, batch.plan.guidance)

    @torch.no_grad()
    def _forward(self, count: int) -> None:
        self._predict(count)

    def _backward(self, count: int) -> None:
        self.trainer.run.accelerator.backward(self._predict(count).square().mean())

    @torch.no_grad()
    def _reference(self, count: int) -> None:
        with self.trainer.model.using(REFERENCE):
            self._predict(count)

    def _optimizer(self) -> None:
        optimizer_step(self.trainer)

    def _score(self, count: int) -> None:
        trainer, batch = self.trainer, self.batch
        group = batch.buffer.group[batch.buffer.leaves[:count]].tolist()
        score(trainer.inputs.rewards, self.pixels[:count], [batch.buffer.prompts[g] for g in group])

    def evaluations_per_image(self) -> dict[str, float]:
        """Count denoiser calls per image, with guidance: sampling, training (with a backward pass), reference.

        Plans move, and images without an advantage are not trained on: means over what was measured.
        """
        factor = 2 if self.trainer.model.guides(self.args.guidance_scale) else 1
        trained = factor * len(self.steps) * statistics.mean(self.taught)
        reference = trained if self.args.kl_beta > 0 else 0
        return {"sampling": factor * statistics.mean(self.sampled), "training": trained, "reference": reference}


def collect(trainer: Trainer[Any], iteration: int) -> Any:
    """Return the data of an iteration: sampled, scored, with advantages."""
    batch = trainer.algorithm.sample(iteration)
    trainer.algorithm.score(batch)
    trainer.algorithm.advantage(batch)
    return batch


def optimizer_step(trainer: Trainer[Any]) -> None:
    """What follows the backward passes, less the loop's checks."""
    loop = trainer.loop
    loop.run.accelerator.clip_grad_norm_(loop.state.parameters, trainer.args.max_grad_norm)
    loop.state.optimizer.step()
    if loop.state.ema is not None:
        loop.state.ema.update()
    loop.state.optimizer.zero_grad(set_to_none=True)


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def peak_memory() -> float:
    """Return the peak memory in GiB, of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * (1 if platform.system() == "Darwin" else 1024) / 2**30


class Comparable(Protocol):
    """A bench that times an iteration by phase, and its bare computations."""

    def whole(self) -> dict[str, float]: ...

    def bare(self) -> dict[str, float]: ...


def compared(bench: Comparable, repeats: int) -> dict[str, Any]:
    """Time wholes and bare parts in turn: medians in seconds, and the ratio of their sums with its range."""
    wholes, bares = [], []
    for _ in range(repeats):
        wholes.append(bench.whole())
        bares.append(bench.bare())
    ratios = [sum(w.values()) / sum(b.values()) for w, b in zip(wholes, bares, strict=True)]
    return {
        "seconds": {name: statistics.median(w[name] for w in wholes) for name in wholes[0]},
        "bare_seconds": {name: statistics.median(b[name] for b in bares) for name in bares[0]},
        "seconds_per_iteration": statistics.median(sum(w.values()) for w in wholes),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/flow_grpo/shapes.yaml")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_flow_grpo.json")
    own, overrides = parser.parse_known_args()
    use_all_cores()
    with tempfile.TemporaryDirectory() as folder:
        args = parse(FlowGRPOConfig, ["--config", str(own.config), *overrides, "--output_dir", folder])
        bench = Bench(FlowGRPOTrainer(args=args))
        found = compared(bench, own.repeats)
    total = found["seconds_per_iteration"]
    result = {
        "config": own.config.name,
        "overrides": overrides,
        "device": device(),
        **found,
        "seconds_per_new_prompt": statistics.median(bench.encoding),
        "images_per_second": bench.images / total,
        "evaluations_per_image": bench.evaluations_per_image(),
        "peak_memory_gib": peak_memory(),
    }
    own.write.parent.mkdir(parents=True, exist_ok=True)
    own.write.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
