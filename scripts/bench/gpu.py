"""Benchmark Flow-GRPO on a GPU: SD3.5-medium, SDXL and FLUX.1-dev at published sizes, with random weights.

    python scripts/bench/gpu.py                                              # every model, every setting
    python scripts/bench/gpu.py --models sd35_medium_512 --settings plain compile
    python scripts/bench/gpu.py --size tiny --models sd35_medium_512         # a small model, on a CPU in seconds
    python scripts/bench/gpu.py --against ~/other --adapter adapter.py:prepare   # and through other code

Per model and setting: images per second while sampling, while training and of whole iterations; evaluations of the
denoiser per image; the FLOP/s that training executes (a frozen base needs no gradients of its weights) as a share of
what the card reaches on large matrices in the same run; peak memory beside the forecast of --dry_run. Text encoders do
not take part: prompts are random embeddings. A setting that does not run is recorded with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation


from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig, Prompt
from diffalign.cli import use_all_cores
from diffalign.diffusion.plan import PlanConfig, make_plan
from diffalign.models.weight_memory import memory_needs
from diffalign.trainers.cost import Share
from diffalign.trainers.flow_grpo.cost import COST
from scripts import ROOT
from scripts.bench.against import Adapter, Job, load_adapter, measure_against
from scripts.bench.flow_grpo import collect, device, peak_memory
from scripts.bench.gpu_models import CASES, CUDA, DEVICE, DTYPE, Case, build

PROMPTS = [f"prompt {i}" for i in range(4)]
Flops = tuple[float, float]  # of an evaluation of an image: without gradients, and with its backward pass
# Each optimisation alone, then those that are free of charge together.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": "auto"},
    "xformers": {"attention": "xformers"},
    "compile": {"compile": True},
    "checkpointing": {"gradient_checkpointing": True},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "base_4bit": {"quantise": "4bit"},
    "rewards_in_turn": {"overlap_rewards": False},
    "fast": {"attention": "auto", "compile": True},
}


# What is measured ----------------------------------------------------------------------------------------------------


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_peak(side: int | None = None) -> float:
    """Measure the FLOP/s of the best of ten large square matrix multiplications in the training dtype."""
    side = side or (8192 if CUDA else 512)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    seconds = []
    for _ in range(11):
        started = now()
        a @ b
        seconds.append(now() - started)
    return 2 * side**3 / min(seconds[1:])


def executed(call: Callable[[], object]) -> int:
    """Count the FLOPs of matrix products, convolutions and attention of a call, including its backward pass."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def brightness(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    return images.mean((1, 2, 3))


class Bench:
    """Time the iterations of one trainer."""

    def __init__(self, case: Case, size: str, changes: Mapping[str, Any], folder: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.args = self.configuration(case, size, changes, folder)
        prompts = [Prompt(text) for text in PROMPTS]
        model = build(case, size, self.args.quantise)
        self.trainer = FlowGRPOTrainer(model=model, args=self.args, reward_funcs=brightness, train_dataset=prompts)
        self.images = self.args.num_groups * self.args.group_size
        self.work = COST.iteration(self.args, Share(), 0, 1)
        needs = memory_needs(model, pairs=0)
        self.forecast = needs.total + COST.stored(self.args, model.latent_shape(), Share())

    @staticmethod
    def configuration(case: Case, size: str, changes: Mapping[str, Any], folder: str) -> FlowGRPOConfig:
        """Build the configuration of a run of this case."""
        small = size == "tiny"
        batch = 2 if small else case.batch
        return FlowGRPOConfig(
            model="random",
            output_dir=Path(folder),
            lora=LoraConfig(rank=4 if small else 32),
            plan=PlanConfig(num_steps=3 if small else 10, **case.plan),
            guidance_scale=case.guidance,
            num_groups=2,
            group_size=batch,
            rollout_batch_size=batch,
            train_batch_size=batch,
            shared_start=False,
            mixed_precision="bf16" if CUDA else "no",
            old_log_prob="recompute" if CUDA else "rollout",
            **changes,
        )

    def flops_per_image(self) -> Flops:
        """Count FLOPs of an evaluation without gradients, and of one with its backward pass."""
        model, batch = self.trainer.model, self.args.train_batch_size
        x, row = torch.randn(batch, *model.latent_shape(), device=model.device), model.encode(["a photo"])
        conditioning, level = row[torch.zeros(batch, dtype=torch.long)], model.levels(2)[0]
        with torch.no_grad():
            forward = executed(lambda: model.predict(x, level, conditioning))
        both = executed(lambda: model.predict(x, level, conditioning).square().mean().backward())
        self.trainer.loop.state.optimizer.zero_grad(set_to_none=True)
        return forward / batch, both / batch

    def iterate(self, iteration: int) -> tuple[float, float]:
        """Time sampling and training, in seconds."""
        started = now()
        batch = collect(self.trainer, iteration)
        collected = now()
        for minibatch in self.trainer.algorithm.minibatches(batch, iteration):
            self.trainer.loop._update(batch, minibatch)
        return collected - started, now() - collected

    def figures(self, flops_per_image: Flops | None, peak: float, repeats: int) -> dict[str, Any]:
        """Measure this setting; the first iteration compiles and warms up."""
        warm_up = sum(self.iterate(0))
        times = [self.iterate(1 + number) for number in range(repeats)]
        sampling, update = (statistics.median(column) for column in zip(*times, strict=True))
        flops = None
        if flops_per_image is not None:
            forward, both = flops_per_image
            flops = (self.work.comparing * forward + self.work.training * both) / update
        per_image = {name: getattr(self.work, name) / self.images for name in ("sampling", "training", "comparing")}
        return {
            "images": self.images,
            "batch": self.args.train_batch_size,
            "images_per_second": {
                "sampling": self.images / sampling,
                "training": self.images / update,
                "iteration": self.images / (sampling + update),
            },
            "evaluations_per_image": per_image,
            "training_flops_per_second": flops,
            "share_of_matrix_peak": None if flops is None else flops / peak,
            "peak_memory_gib": peak_memory(),
            "forecast_memory_gib": self.forecast / 2**30,
            "warm_up_seconds": warm_up,
        }


def counted(case: Case, size: str, changes: Mapping[str, Any], folder: str) -> tuple[Bench | None, Flops | None]:
    """Return a trainer and its FLOPs per image; neither if it does not fit, such as a base that fits in 4 bits only."""
    try:
        bench = Bench(case, size, changes, folder)
        return bench, bench.flops_per_image()
    except torch.OutOfMemoryError:
        return None, None


def job_of(case: Case, size: str, checkout: Path) -> Job:
    """Describe the work of ``Bench`` for other code."""
    with tempfile.TemporaryDirectory() as folder:
        args = Bench.configuration(case, size, {}, folder)
    model = build(case, size)
    return Job(
        checkout=checkout,
        pipeline=model.pipeline,
        prompts=tuple(PROMPTS[: args.num_groups]),
        group_size=args.group_size,
        batch=args.train_batch_size,
        resolution=model.default_resolution[0],
        num_steps=args.plan.num_steps,
        trained_steps=tuple(make_plan(args.plan, 0, args.seed).trained_steps),
        noise_level=args.plan.noise_level,
        guidance_scale=args.guidance_scale,
        lora_rank=args.lora.rank,
        lora_targets=model.lora_targets,
        learning_rate=args.learning_rate,
        precision=args.mixed_precision,
        reward=lambda images: brightness(images, [], []),
    )


def measure(case: Case, size: str, setting: str, counts: dict[bool, Flops | None], peak: float, repeats: int) -> dict:
    """Measure a setting, or say why it does not run. counts: FLOPs per image, by checkpointing, counted once."""
    changes = SETTINGS[setting]
    checkpointing = changes.get("gradient_checkpointing", False)
    uncompiled = {"gradient_checkpointing": True} if checkpointing else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = None
            if checkpointing not in counts:
                # Without compilation, whose kernels the counter does not see into.
                bench, counts[checkpointing] = counted(case, size, uncompiled, folder)
            if changes != uncompiled:
                bench = None  # its memory is free before the next one is built
            bench = bench or Bench(case, size, changes, folder)
            return bench.figures(counts[checkpointing], peak, repeats)
        except (ValueError, RuntimeError, ImportError) as error:
            return {"refused": str(error).splitlines()[0]}


def against(
    case: Case, size: str, checkout: Path, adapter: Adapter, rows: Mapping[str, Mapping[str, Any]], repeats: int
) -> dict[str, Any]:
    """Measure the other code beside the first of our settings that ran."""
    if (ours := next((name for name, row in rows.items() if "refused" not in row), None)) is None:
        return {"refused": "none of our settings ran: there is nothing to compare with"}
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = measure_against(adapter, job_of(case, size, checkout), rows[ours], repeats, now)
    return {"setting": ours, **found, "peak_memory_gib": peak_memory()}


def report(file: Path, result: Mapping[str, Any], model: str, row: str) -> None:
    """Print a row, and write the results so far."""
    print(model, row, json.dumps(result["models"][model][row]), flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_gpu.json")
    parser.add_argument("--against", type=Path, help="a checkout of another trainer's repository")
    parser.add_argument("--adapter", help="what drives it, file.py:function; see scripts/bench/against.py")
    args = parser.parse_args()
    if (args.against is None) != (args.adapter is None):
        parser.error("--against and --adapter go together: the checkout, and what drives it")
    adapter = None if args.adapter is None else load_adapter(args.adapter)
    if args.size == "published" and not CUDA:
        parser.error("published sizes need a CUDA device, and there is none: use --size tiny")
    use_all_cores()
    peak = matrix_peak()
    command = f"python scripts/bench/gpu.py {' '.join(sys.argv[1:])}"
    result: dict[str, Any] = {
        "command": command,
        "size": args.size,
        "device": device(),
        "torch": torch.__version__,
    }
    result |= {"matrix_peak_flops_per_second": peak, "models": {}}
    for name in args.models:
        counts: dict[bool, Flops | None] = {}
        rows = result["models"][name] = {}
        for setting in args.settings:
            rows[setting] = measure(CASES[name], args.size, setting, counts, peak, args.repeats)
            report(args.write, result, name, setting)
        if adapter is not None:
            rows["against"] = against(CASES[name], args.size, args.against, adapter, rows, args.repeats)
            report(args.write, result, name, "against")


if __name__ == "__main__":
    main()
