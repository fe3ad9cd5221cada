"""Seconds of a few evaluations, through the very trainer that would run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.device import synchronize
from diffalign.models.editing import example_prompt
from diffalign.models.offload import VAE
from diffalign.rollout.generate import decode
from diffalign.runtime.run import Run
from diffalign.structures import Guidance
from diffalign.trainers.cost import Work

REPEATS = 3


@dataclass(frozen=True)
class Pace:
    """Seconds per image.

    Attributes:
        forward: Evaluation without gradients.
        training: Evaluation with its backward pass.
        decoding: Decoding without gradients.
        peak: Peak of a training pass on a GPU in GiB, activations included; None on a CPU.
        judging: Decoding with its backward pass.
    """

    forward: float
    training: float
    decoding: float
    peak: float | None
    judging: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return the seconds of ``work`` with decoding, without rewards."""
        forward = work.sampling + work.comparing + work.evaluating
        passes = forward * self.forward + work.training * self.training
        return passes + (work.judged * self.judging if work.judged else work.generated * self.decoding)


def measure(
    run: Run[Any], optimizer: torch.optim.Optimizer, sampling: int, training: int, *, judging: bool = False
) -> Pace:
    """Time passes of ``sampling`` and ``training`` images.

    Args:
        run: The training. Half of a training pass is for the negative output where a negative prompt is trained.
        optimizer: Its optimizer, whose gradients are cleared.
        sampling: Images per pass without gradients.
        training: Images per pass with a backward pass.
        judging: Whether to time decoding with a gradient too.

    Raises:
        torch.OutOfMemoryError: A pass does not fit.
    """
    model, device = run.model, run.accelerator.device
    row, level = model.encode_input(example_prompt(model, "a photo").input), model.levels(2)[0]

    def predict(images: int, guidance: Guidance | None = None) -> torch.Tensor:
        x = torch.randn(images, *model.latent_shape(), generator=torch.Generator().manual_seed(0)).to(device)
        return model.predict(x, level, row[torch.zeros(images, dtype=torch.long)], guidance)

    def backward() -> None:
        if model.negative is None:
            output = predict(training)
        else:
            negative = model.negative.conditioning(run.module())
            output = predict(training // 2, Guidance(run.guidance_scale, negative))
        run.accelerator.backward(output.square().mean())
        optimizer.zero_grad(set_to_none=True)

    def judge() -> None:
        latents = torch.zeros(1, *model.latent_shape(), device=device, requires_grad=True)
        model.decode(latents).mean().backward()

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taught = _seconds(backward, device) / training
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    with torch.no_grad():
        sampled = _seconds(lambda: predict(sampling), device) / sampling
        latents = torch.zeros(min(sampling, 8), *model.latent_shape(), device=device)
    with model.keeping(VAE):
        decoded = _seconds(lambda: decode(model, latents), device) / len(latents)
        judged = _seconds(judge, device) if judging else 0.0
    return Pace(sampled, taught, decoded, peak, judged)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of a few calls, after a first one to warm up."""
    call()
    found = []
    for _ in range(REPEATS):
        start = _now(device)
        call()
        found.append(_now(device) - start)
    return min(found)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
