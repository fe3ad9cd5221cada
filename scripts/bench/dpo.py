"""Benchmark Diffusion-DPO: pairs per second, and the ratio to the bare cost of its passes.

    python scripts/bench/dpo.py                                  # the embedded world
    python scripts/bench/dpo.py --config my.yaml --repeats 9     # any data set; fields as for training

The bare cost is that of the policy's forward and backward passes, the reference's forward passes and the optimizer
step, each measured alone at the same shapes, precision and threads. Optimizer steps and bare parts alternate, and
medians are compared, so that a busy machine slows both. The pairs of a step have been seen before: a run reads and
encodes each once, as long as the latents fit in memory, and what that costs (``seconds_per_new_pair``) stands beside
the ratio.
Writes ``assets/results/bench_dpo.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer
from diffalign.cli import use_all_cores
from diffalign.config import parse
from diffalign.models.weights import REFERENCE
from diffalign.rollout.sampler import micro_batches
from diffalign.structures import Conditioning
from scripts import ROOT
from scripts.bench.flow_grpo import collect, compared, device, optimizer_step, peak_memory


class Bench:
    """Time a trainer's optimizer steps, and the parts that every implementation needs."""

    def __init__(self, trainer: DiffusionDPOTrainer) -> None:
        self.trainer, self.args, self.model = trainer, trainer.args, trainer.model
        self.iteration = 0
        self.new: list[float] = []  # seconds more that a pair costs when it is seen for the first time
        self.whole()  # a first step makes the optimizer's moments and warms everything up
        self.pairs, self.sides = self.batch.ranked.latents.shape[:2]
        self.sizes = [len(range(self.pairs)[rows]) for rows in micro_batches(self.pairs, self.args.train_batch_size)]
        self.inputs = self._inputs(self.sizes[0])

    def whole(self) -> dict[str, float]:
        """Time the phases of an optimizer step on pairs that are in the latent cache."""
        trainer = self.trainer
        started = self._now()
        trainer.run.prompts(collect(trainer, self.iteration).ranked.texts)
        fresh = self._now()
        batch = self.batch = collect(trainer, self.iteration)
        collected = self._now()
        self.new.append((fresh - started - (collected - fresh)) / len(batch.ranked.texts))
        for minibatch in trainer.algorithm.minibatches(batch, self.iteration):
            trainer.algorithm.on_step(batch, trainer.loop._update(batch, minibatch))
        self.iteration += 1
        return {"collect": collected - fresh, "update": self._now() - collected}

    def bare(self) -> dict[str, float]:
        """Time each part alone, multiplied by its count per optimizer step."""
        passes = sum(self.sizes) / self.sizes[0]
        parts = {"forward and backward": (self._backward, passes), "optimizer": (self._optimizer, 1)}
        if self.args.compares:
            parts["reference forward"] = (self._reference, passes)
        result = {}
        for name, (call, times) in parts.items():
            started = self._now()
            call()
            result[name] = (self._now() - started) * times
        return result

    def _now(self) -> float:
        if self.trainer.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _inputs(self, count: int) -> tuple:
        """What the denoiser sees of a micro-batch: both sides of ``count`` pairs."""
        examples, model = self.batch.ranked, self.model
        x = examples.latents[:count].transpose(0, 1).flatten(0, 1).to(model.device)
        levels = model.level_at(torch.linspace(0.1, 0.9, len(x)) * model.num_train_timesteps)
        conditioning = Conditioning.cat([self.trainer.run.prompts(examples.texts[:count])] * self.sides)
        if examples.sizes is not None:
            height, width = model.default_resolution
            size = torch.tensor([[height, width]] * len(x))
            conditioning = model.with_sizes(conditioning, size, torch.zeros_like(size), size)
        return x, levels, conditioning

    def _backward(self) -> None:
        self.trainer.run.accelerator.backward(self.model.predict(*self.inputs).square().mean())

    @torch.no_grad()
    def _reference(self) -> None:
        with self.model.using(REFERENCE):
            self.model.predict(*self.inputs)

    def _optimizer(self) -> None:
        optimizer_step(self.trainer)


def measure(bench: Bench, repeats: int) -> dict[str, object]:
    """Return medians over ``repeats``, and the ratio of the whole to the sum of the bare parts."""
    found = compared(bench, repeats)
    return {
        "pairs": bench.pairs,
        "pairs_per_second": bench.pairs / found["seconds_per_iteration"],
        "bare_pairs_per_second": bench.pairs / sum(found["bare_seconds"].values()),
        "seconds_per_new_pair": statistics.median(bench.new),
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/diffusion_dpo/shapes.yaml")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_dpo.json")
    own, overrides = parser.parse_known_args()
    use_all_cores()
    with tempfile.TemporaryDirectory() as folder:
        args = parse(DiffusionDPOConfig, ["--config", str(own.config), *overrides, "--output_dir", folder])
        if args.online or args.losers == "reference":
            parser.error("pairs of the model's own images cost rollouts: bench/flow_grpo.py times those")
        found = measure(Bench(DiffusionDPOTrainer(args=args)), own.repeats)
    result = {"config": own.config.name, "overrides": overrides, "device": device(), **found}
    result["peak_memory_gib"] = peak_memory()
    own.write.parent.mkdir(parents=True, exist_ok=True)
    own.write.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
