"""Benchmark another trainer's code on the same work, in the same run.

    python scripts/bench/gpu.py --against ~/other --adapter adapter.py:prepare

No repository is known here. An adapter function of the user takes a ``Job`` and returns what
does one iteration of it (``flow_grpo_loop.py`` and ``dpo_loop.py`` in this folder are such adapters):

    # adapter.py
    def prepare(job):
        from other.trainer import Trainer            # job.checkout is first on sys.path

        trainer = Trainer(job.pipeline, rank=job.lora_rank, reward=job.reward)
        return lambda: trainer.step(job.prompts)     # sample, judge, and one optimizer step

The denoiser's calls are counted while it runs, by images: a ratio of times is one of the same work only where the
counts are those of ours, which ``same_work`` tells.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of one iteration.

    Attributes:
        checkout: Folder of the other repository.
        pipeline: Of plain diffusers, on its device, with nothing that trains. At published sizes its
            ``encode_prompt`` returns random embeddings, and it has no text encoders.
        prompts: Those of an iteration, one per group or pair.
        batch: Images or pairs per pass.
        resolution: Side of the images.
        lora_rank: Of the adapter.
        lora_targets: Layers that it adapts.
        learning_rate: Of AdamW.
        precision: "bf16" or "no".
    """

    checkout: Path
    pipeline: DiffusionPipeline
    prompts: tuple[str, ...]
    batch: int
    resolution: int
    lora_rank: int
    lora_targets: tuple[str, ...]
    learning_rate: float
    precision: str

    @property
    def images(self) -> int:
        """What rates count: images of an iteration, or pairs."""
        return len(self.prompts)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that trains."""
        parts = self.pipeline.components
        return parts["transformer"] if "transformer" in parts else parts["unet"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of mixed precision."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        """Return a context of mixed precision."""
        return torch.autocast(self.denoiser.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True, kw_only=True)
class RolloutJob(Job):
    """An iteration of policy gradients.

    Attributes:
        group_size: Images of each prompt.
        num_steps: Of a sampling.
        trained_steps: Places in it of the steps that draw noise and train.
        noise_level: Of these steps.
        guidance_scale: Of sampling and training.
        reward: Images (B, 3, H, W) in [0, 1] -> (B,).
    """

    group_size: int
    num_steps: int
    trained_steps: tuple[int, ...]
    noise_level: float
    guidance_scale: float
    reward: Callable[[Tensor], Tensor]

    @property
    def images(self) -> int:
        """Images of an iteration."""
        return len(self.prompts) * self.group_size


@dataclass(frozen=True, kw_only=True)
class PreferenceJob(Job):
    """An optimizer step of Diffusion-DPO on as many pairs of images as there are prompts. beta: of its loss."""

    beta: float


def with_lora(job: Job) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Add a float32 LoRA to the frozen denoiser with peft; return what trains, and its optimizer."""
    network = job.denoiser.requires_grad_(False)
    config = LoraConfig(r=job.lora_rank, lora_alpha=job.lora_rank, target_modules=list(job.lora_targets))
    network.add_adapter(config)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained, torch.optim.AdamW(trained, lr=job.learning_rate)


Adapter = Callable[[Job], Callable[[], object]]


def load_adapter(spec: str) -> Adapter:
    """Load the function that ``file.py:function`` names. Raises ValueError if there is none."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"adapter {spec!r}: no file {file!r}; write file.py:function")
    title = f"bench_adapter_{Path(file).stem}"
    found = importlib.util.spec_from_file_location(title, file)
    assert found is not None
    assert found.loader is not None
    sys.modules[title] = module = importlib.util.module_from_spec(found)  # dataclasses look it up
    found.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"adapter {spec!r}: {file} has no function {name!r}; see scripts/bench/against.py")
    return function


class Counter:
    """Count the images that pass a denoiser. images: (without gradients, with)."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.images = [0, 0]
        denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self.images[torch.is_grad_enabled()] += len(latents)


def measure_against(
    adapter: Adapter, job: Job, ours: Mapping[str, Any], repeats: int, now: Callable[[], float]
) -> dict[str, Any]:
    """Measure the other code beside a row of ours, or say why it does not run. now: a clock, in seconds."""
    sys.path.insert(0, str(job.checkout))
    try:
        return _measured(adapter, job, ours, repeats, now)
    except Exception as error:  # the code of others: what it raises is unknown
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        sys.path.remove(str(job.checkout))


def _measured(
    adapter: Adapter, job: Job, ours: Mapping[str, Any], repeats: int, now: Callable[[], float]
) -> dict[str, Any]:
    counter = Counter(job.denoiser)
    iterate = adapter(job)
    started = now()
    iterate()
    warm_up, seconds = now() - started, []
    counter.images = [0, 0]
    for _ in range(repeats):
        started = now()
        iterate()
        seconds.append(now() - started)
    free, taught = (count / repeats / job.images for count in counter.images)
    rate, expected = job.images / statistics.median(seconds), ours["evaluations_per_image"]
    most = expected["sampling"] + expected["comparing"]
    # Old log-probs may be recomputed or kept from sampling; both are accepted.
    least = expected["sampling"] if isinstance(job, RolloutJob) else most
    return {
        "images_per_second": rate,
        "evaluations_per_image": {"without gradients": free, "with gradients": taught},
        "same_work": taught == expected["training"] and least <= free <= most,
        "warm_up_seconds": warm_up,
        "seconds_over_ours": ours["images_per_second"]["iteration"] / rate,
    }
