"""Benchmark an optimizer step of a recipe against its bare passes, and the memory that each saving saves.

    python scripts/bench/refl.py                                         # the configuration of the embedded world
    python scripts/bench/refl.py --config my.yaml --repeats 9            # any run; fields as for training
    python scripts/bench/refl.py --presets draft_1 drtune                # several recipes, one after the other

The bare cost is that of the denoiser's calls without and with a backward pass, of decoding and judging with a backward
pass, and of the optimizer, each measured alone at the same shapes and threads. Steps and bare parts alternate, and
medians are compared, so that a busy machine slows both. Peak memory is that of a fresh process for each saving, the
others off; of it the step's own is what it adds to the memory in use before it. Writes
``assets/results/bench_refl.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign import ReFLConfig, ReFLTrainer
from diffalign.cli import use_all_cores
from diffalign.config import parse
from diffalign.rewards.base import ask
from diffalign.rollout.sampler import micro_batches
from diffalign.trainers.refl.initial_states import Batch
from scripts import ROOT
from scripts.bench.flow_grpo import collect, device, optimizer_step, peak_memory

OFF = {
    "gradient_checkpointing": "false",
    "step_checkpointing": "false",
    "vae_checkpointing": "false",
    "decode_slice": "0",
}
STATUS = Path("/proc/self/status")
SAVINGS: dict[str, dict[str, str]] = {
    "none": {},
    "gradient_checkpointing": {"gradient_checkpointing": "true"},
    "step_checkpointing": {"step_checkpointing": "true"},
    "vae_checkpointing": {"vae_checkpointing": "true"},
    "decode_slice 1": {"decode_slice": "1"},
    "train_batch_size 1": {"train_batch_size": "1"},
}


class Bench:
    """Time a trainer's steps, and the passes that every implementation needs."""

    def __init__(self, trainer: ReFLTrainer) -> None:
        self.trainer, self.args, self.step = trainer, trainer.args, 0
        self.whole()  # a first step warms everything up
        self.image = trainer.model.decode(self._latents(self.batch.parts[0], 1)).detach()

    def whole(self) -> float:
        """Time a step with encoded prompts: a run encodes each prompt once."""
        trainer = self.trainer
        iteration = self.step
        if hasattr(trainer.algorithm.starts, "prompts"):
            share = range(self.args.num_groups)
            start = trainer.algorithm.starts(iteration, [(group, 0) for group in share], 0)
            trainer.run.prompts([prompt.text for prompt in start.prompts])
        started = self._now()
        batch = self.batch = collect(trainer, iteration)
        for minibatch in trainer.algorithm.minibatches(batch, iteration):
            trainer.loop._update(batch, minibatch)
        self.step += 1
        return self._now() - started

    def bare(self) -> dict[str, float]:
        """Time each kind of pass of the last step alone, multiplied by its count."""
        trainer = self.trainer
        kinds = ("sampling", "denoiser, recorded", "decoding and judging", "regulariser", "optimizer")
        found = dict.fromkeys(kinds, 0.0)
        for batch in self.batch.parts:
            count = len(batch.samples)
            passes = [len(range(count)[rows]) for rows in micro_batches(count, self.args.train_batch_size)]
            steps = int(batch.buffer.step.max()) - trainer.algorithm.recipe.first
            found["sampling"] += steps * self._timed(lambda b=batch, c=count: self._forward(b, c)) if steps else 0.0
            for course in batch.courses:
                calls = len(course.moves)
                recorded = sum(move.gradient for move in course.moves)
                for size in passes:
                    free = calls - recorded
                    found["sampling"] += free * self._timed(lambda b=batch, s=size: self._forward(b, s)) if free else 0
                    found["denoiser, recorded"] += recorded * self._timed(lambda b=batch, s=size: self._backward(b, s))
                    found["decoding and judging"] += self._timed(lambda b=batch, s=size: self._judge(b, s))
                    if trainer.algorithm.recipe.regulariser == "reference":
                        found["regulariser"] += recorded * self._timed(lambda b=batch, s=size: self._forward(b, s))
                    elif trainer.algorithm.recipe.regulariser == "pretraining":
                        found["regulariser"] += self._timed(lambda b=batch, s=size: self._backward(b, s))
        found["optimizer"] = self._timed(self._optimizer)
        return found

    def _timed(self, call: Callable[[], object]) -> float:
        started = self._now()
        call()
        return self._now() - started

    def _now(self) -> float:
        if self.trainer.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _latents(self, batch: Batch, count: int) -> torch.Tensor:
        return batch.state(torch.arange(count), int(batch.buffer.step.max()))

    @torch.no_grad()
    def _forward(self, batch: Batch, count: int) -> None:
        level = self.trainer.algorithm.levels[self.trainer.algorithm.recipe.num_steps // 2]
        guidance = self.trainer.algorithm.guidance.plain
        self.trainer.model.predict(
            self._latents(batch, count), level, batch.conditioning[torch.arange(count)], guidance
        )

    def _backward(self, batch: Batch, count: int) -> None:
        trainer = self.trainer
        level = trainer.algorithm.levels[trainer.algorithm.recipe.num_steps // 2]
        # An input with a gradient, where the course passes it on: the backward pass is longer then.
        x = self._latents(batch, count).requires_grad_(
            trainer.algorithm.recipe.through > 0 and trainer.algorithm.recipe.gradient_steps != 1
        )
        conditioning = batch.conditioning[torch.arange(count)]
        output = trainer.model.predict(x, level, conditioning, trainer.algorithm.guidance.recorded)
        trainer.run.accelerator.backward(output.square().mean())

    def _judge(self, batch: Batch, count: int) -> None:
        trainer = self.trainer
        latents = self._latents(batch, count).requires_grad_()
        images = trainer.model.decode(latents)
        prompts = batch.prompts[:count]
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        total = latents.new_zeros(())
        for reward in trainer.inputs.rewards.values():
            for text in batch.courses[0].words or ("",):
                total = total + ask(reward, images, [f"{text} {t}" for t in texts], metadata)[0].sum()
        torch.autograd.grad(total, latents)

    def _optimizer(self) -> None:
        optimizer_step(self.trainer)


def trainer_of(config: Path, overrides: Sequence[str], folder: str) -> ReFLTrainer:
    return ReFLTrainer(args=parse(ReFLConfig, ["--config", str(config), *overrides, "--output_dir", folder]))


def timed(config: Path, overrides: Sequence[str], repeats: int) -> dict[str, object]:
    """Compare the seconds of a step with those of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(trainer_of(config, overrides, folder))
        wholes, bares = [], []
        for _ in range(repeats):
            wholes.append(bench.whole())
            bares.append(bench.bare())
    ratios = [whole / sum(bare.values()) for whole, bare in zip(wholes, bares, strict=True)]
    seconds = statistics.median(wholes)
    args = bench.args
    return {
        "seconds_per_step": seconds,
        "steps_per_second": 1 / seconds,
        "images_per_second": args.num_groups * args.group_size / seconds,
        "bare_seconds": {name: statistics.median(bare[name] for bare in bares) for name in bares[0]},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def memory(config: Path, overrides: Sequence[str], savings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure, per saving, the peak memory of a process that takes one step, and what the step added."""
    found = {}
    for name in savings:
        options = [word for key, value in {**OFF, **SAVINGS[name]}.items() for word in (f"--{key}", value)]
        command = [sys.executable, __file__, "--config", str(config), "--one_step", *overrides, *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    return found


def one_step(config: Path, overrides: Sequence[str]) -> None:
    """Take one step; print the peak of the whole process, and what the step added at most."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(config, overrides, folder)
        batch = collect(trainer, 0)
        sampled, before = peak_memory(), forget_peak()
        (minibatch,) = trainer.algorithm.minibatches(batch, 0)
        trainer.loop._update(batch, minibatch)
        peak = peak_since()
        print(json.dumps({"peak_gib": max(sampled, peak), "step_gib": peak - before}))


def forget_peak() -> float:
    """Return the GiB in use, and reset the peak, which would otherwise include loading and sampling."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    if not STATUS.is_file():
        raise SystemExit("the memory of a step is measured on Linux or on a GPU: pass --savings without names")
    # What was freed goes back to the system first, or the step would take it without a trace.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    STATUS.with_name("clear_refs").write_text("5")
    return resident("VmRSS")


def peak_since() -> float:
    """Return the peak in GiB since ``forget_peak``."""
    return peak_memory() if torch.cuda.is_available() else resident("VmHWM")


def resident(field: str) -> float:
    """Read GiB from a line of /proc/self/status; unlike ``getrusage``, it excludes the parent process."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/refl/shapes.yaml")
    parser.add_argument("--presets", nargs="+", help="default: the configuration's own")
    parser.add_argument("--savings", nargs="*", choices=list(SAVINGS), default=list(SAVINGS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one_step", action="store_true", help="take one step and print the peak of memory")
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_refl.json")
    own, overrides = parser.parse_known_args()
    use_all_cores()
    if own.one_step:
        one_step(own.config, overrides)
        return
    variants = {p: [*overrides, "--recipe.preset", p] for p in own.presets} if own.presets else {"own": overrides}
    result: dict[str, object] = {
        "config": own.config.name,
        "overrides": overrides,
        "device": device(),
        "repeats": own.repeats,
        "steps": {name: timed(own.config, options, own.repeats) for name, options in variants.items()},
        "memory": {name: memory(own.config, options, own.savings) for name, options in variants.items()},
    }
    own.write.parent.mkdir(parents=True, exist_ok=True)
    own.write.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
