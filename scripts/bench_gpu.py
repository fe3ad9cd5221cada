"""What Flow-GRPO costs on a card: SD3.5-medium, SDXL and FLUX.1-dev at their published sizes, with random weights.

    python scripts/bench_gpu.py                                              # every model, every setting
    python scripts/bench_gpu.py --models sd35_medium_512 --settings plain compile
    python scripts/bench_gpu.py --size tiny --models sd35_medium_512         # a small model, on a CPU in seconds

Per model and setting: images per second while sampling, while training and of whole iterations; evaluations of the
denoiser per image; the FLOP/s that training executes (a frozen base needs no gradients of its weights) as a share of
what the card reaches on large matrices in the same run; peak memory beside the forecast of --dry_run. Text encoders do
not take part: prompts are random embeddings. A setting that does not run is recorded with its reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from bench_flow_grpo import device, peak_memory
from torch.utils.flop_counter import FlopCounterMode

from diffalign import DiffusionModel, FlowGRPOConfig, FlowGRPOTrainer, LoraConfig, Prompt
from diffalign.cli import use_all_cores
from diffalign.diffusion.plan import PlanConfig
from diffalign.forecast.methods import METHODS
from diffalign.forecast.work import Share
from diffalign.models import FAMILIES, load_model
from diffalign.models.memory import memory_needs

ROOT = Path(__file__).parents[1]
Flops = tuple[float, float]  # of an evaluation of an image: without gradients, and with its backward pass
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Case:
    """A model and what one run of it does. size: name -> where its pipeline is built, as module:function."""

    size: Mapping[str, str]
    resolution: int
    batch: int
    guidance: float = 1.0
    plan: Mapping[str, Any] = field(default_factory=dict)


SD35 = {"published": "tests.models.published:sd35_medium", "tiny": "tests.conftest:PIPELINE"}
SDXL = {"published": "tests.models.published:sdxl", "tiny": "tests.models.tiny:sdxl"}
FLUX = {"published": "tests.models.published_flow:flux_dev", "tiny": "tests.models.tiny_flow:flux_dev"}
CASES = {
    "sd35_medium_512": Case(SD35, 512, 8, 4.5),
    "sd35_medium_1024": Case(SD35, 1024, 4, 4.5),
    "sdxl_1024": Case(SDXL, 1024, 4, 5.0, {"solver": "ddim"}),
    "flux1_dev_512": Case(FLUX, 512, 4),
}
# Each optimisation alone, then those that are free of charge together.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": "auto"},
    "xformers": {"attention": "xformers"},
    "compile": {"compile": True},
    "checkpointing": {"gradient_checkpointing": True},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "fast": {"attention": "auto", "compile": True},
}
# Tokens of a prompt and where the denoiser's configuration has their width.
SPOKEN = {
    "StableDiffusion3Pipeline": (77 + 256, "joint_attention_dim"),
    "StableDiffusionXLPipeline": (77, "cross_attention_dim"),
    "FluxPipeline": (512, "joint_attention_dim"),
}


# The model -----------------------------------------------------------------------------------------------------------


def build(case: Case, size: str) -> DiffusionModel:
    """The pipeline in bfloat16 on a GPU, in float32 on a CPU; published sizes with random weights."""
    module, name = case.size[size].split(":")
    source = getattr(importlib.import_module(module), name)
    if isinstance(source, Path):
        return load_model(source, max_sequence_length=16)
    if size == "tiny":
        pipeline = source()
        return FAMILIES[type(pipeline).__name__](pipeline)
    with torch.device("meta"):
        pipeline = source()
    family = FAMILIES[type(pipeline).__name__]
    denoiser = getattr(pipeline, family.denoiser_name)
    for part, dtype in ((denoiser, torch.bfloat16 if CUDA else torch.float32), (pipeline.vae, torch.float32)):
        part.to(dtype).to_empty(device=DEVICE)
        fill(part)
    silence(pipeline, denoiser.config)
    return family(pipeline, resolution=case.resolution)


@torch.no_grad()
def fill(part: torch.nn.Module) -> None:
    """Random numbers, small enough for a deep network to stay finite."""
    for tensor in [*part.parameters(), *part.buffers()]:
        tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()


def silence(pipeline: Any, config: Any) -> None:
    """Takes the text encoders out: prompts become random embeddings of their shape."""
    kind = type(pipeline).__name__
    length, width = SPOKEN[kind]
    pooled_width = config.get("pooled_projection_dim")
    if pooled_width is None:
        pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def encode_prompt(prompt: str | list[str], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        count = 1 if isinstance(prompt, str) else len(prompt)
        embeds, pooled = torch.randn(count, length, config[width]), torch.randn(count, pooled_width)
        return (embeds, pooled, torch.zeros(length, 3)) if kind == "FluxPipeline" else (embeds, embeds, pooled, pooled)

    for name in pipeline.components:
        if name.startswith("text_encoder"):
            object.__setattr__(pipeline, name, SimpleNamespace(device=torch.device("cpu")))
    pipeline.encode_prompt = encode_prompt


# What is measured ----------------------------------------------------------------------------------------------------


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_peak(side: int | None = None) -> float:
    """The FLOP/s of the best of ten multiplications of large square matrices, in the dtype that trainings use."""
    side = side or (8192 if CUDA else 512)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32) for _ in range(2))
    seconds = []
    for _ in range(11):
        begun = now()
        a @ b
        seconds.append(now() - begun)
    return 2 * side**3 / min(seconds[1:])


def executed(call: Callable[[], object]) -> int:
    """The FLOPs of matrix products, convolutions and attention that a call executes, its backward pass included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def brightness(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    return images.mean((1, 2, 3))


class Bench:
    """One trainer, its iterations timed."""

    def __init__(self, case: Case, size: str, changes: Mapping[str, Any], folder: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        small = size == "tiny"
        batch = 2 if small else case.batch
        self.args = FlowGRPOConfig(
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
        prompts = [Prompt(f"prompt {i}") for i in range(4)]
        model = build(case, size)
        self.trainer = FlowGRPOTrainer(model=model, args=self.args, reward_funcs=brightness, train_dataset=prompts)
        self.images = self.args.num_groups * self.args.group_size
        self.work = METHODS["flow_grpo"].iteration(self.args, Share(), 0, 1)
        needs = memory_needs(model, pairs=0)
        self.forecast = needs.total + METHODS["flow_grpo"].stored(self.args, model.latent_shape(), Share())

    def flops_per_image(self) -> Flops:
        """Of an evaluation without gradients, and of one with its backward pass."""
        model, batch = self.trainer.model, self.args.train_batch_size
        x, row = torch.randn(batch, *model.latent_shape(), device=model.device), model.encode(["a photo"])
        conditioning, level = row[torch.zeros(batch, dtype=torch.long)], model.levels(2)[0]
        with torch.no_grad():
            forward = executed(lambda: model.predict(x, level, conditioning))
        both = executed(lambda: model.predict(x, level, conditioning).square().mean().backward())
        self.trainer.loop.optimizer.zero_grad(set_to_none=True)
        return forward / batch, both / batch

    def iterate(self, iteration: int) -> tuple[float, float]:
        """Seconds of sampling and of training."""
        begun = now()
        self.trainer.collect(iteration)
        collected = now()
        for micros in self.trainer.updates(iteration):
            self.trainer.loop._update(micros)
        return collected - begun, now() - collected

    def figures(self, flops_per_image: Flops, peak: float, repeats: int) -> dict[str, Any]:
        """Everything about this setting; a first iteration compiles and warms up."""
        warm_up = sum(self.iterate(0))
        times = [self.iterate(1 + number) for number in range(repeats)]
        collect, update = (statistics.median(column) for column in zip(*times, strict=True))
        forward, both = flops_per_image
        flops = (self.work.comparing * forward + self.work.training * both) / update
        per_image = {name: getattr(self.work, name) / self.images for name in ("sampling", "training", "comparing")}
        return {
            "images": self.images,
            "batch": self.args.train_batch_size,
            "images_per_second": {
                "sampling": self.images / collect,
                "training": self.images / update,
                "iteration": self.images / (collect + update),
            },
            "evaluations_per_image": per_image,
            "training_flops_per_second": flops,
            "share_of_matrix_peak": flops / peak,
            "peak_memory_gib": peak_memory(),
            "forecast_memory_gib": self.forecast / 2**30,
            "warm_up_seconds": warm_up,
        }


def measure(case: Case, size: str, setting: str, counts: dict[bool, Flops], peak: float, repeats: int) -> dict:
    """The figures of a setting, or why it does not run. counts: FLOPs per image, by checkpointing, counted once."""
    changes = SETTINGS[setting]
    checkpointing = changes.get("gradient_checkpointing", False)
    uncompiled = {"gradient_checkpointing": True} if checkpointing else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = None
            if checkpointing not in counts:
                # Without compilation, whose kernels the counter does not see into.
                bench = Bench(case, size, uncompiled, folder)
                counts[checkpointing] = bench.flops_per_image()
            if changes != uncompiled:
                bench = None  # its memory is free before the next one is built
            bench = bench or Bench(case, size, changes, folder)
            return bench.figures(counts[checkpointing], peak, repeats)
        except (ValueError, RuntimeError, ImportError) as error:
            return {"refused": str(error).splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_gpu.json")
    told = parser.parse_args()
    if told.size == "published" and not CUDA:
        parser.error("published sizes need a CUDA device, and there is none: use --size tiny")
    sys.path.insert(0, str(ROOT))  # published sizes stand where the tests check them
    use_all_cores()
    peak = matrix_peak()
    command = f"python scripts/bench_gpu.py {' '.join(sys.argv[1:])}"
    result: dict[str, Any] = {
        "command": command,
        "size": told.size,
        "device": device(),
        "torch": torch.__version__,
    }
    result |= {"matrix_peak_flops_per_second": peak, "models": {}}
    for name in told.models:
        counts: dict[bool, Flops] = {}
        rows = result["models"][name] = {}
        for setting in told.settings:
            rows[setting] = measure(CASES[name], told.size, setting, counts, peak, told.repeats)
            print(name, setting, json.dumps(rows[setting]), flush=True)
            told.write.parent.mkdir(parents=True, exist_ok=True)
            told.write.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
