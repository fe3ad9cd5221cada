"""Parts that fail on some machines only: kernels of attention, torch.compile, and the LoRA's way to plain diffusers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffalign.commands.doctor.findings import Finding
from diffalign.models import DiffusionModel, LoraConfig, load_model, with_tuned_weights
from diffalign.models.attention import LISTED, NATIVE, choose_attention, refusal
from diffalign.models.compiling import compile_refusal
from diffalign.structures import Conditioning

# A LoRA is loaded by other code than what trained it, which may multiply in another order.
LORA_TOLERANCE = 1e-4


def training_device() -> tuple[torch.device, torch.dtype]:
    """What a run would use, and the dtype that suits it."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def attention() -> Iterator[Finding]:
    """Every back end, called."""
    device, dtype = training_device()
    for name in LISTED:
        reason = refusal(name, device, dtype)
        if reason is None:
            yield Finding(f"attention {name}", "ok", f"trains on {device.type} in {str(dtype).removeprefix('torch.')}")
        elif name == NATIVE:
            fix = "torch's own attention must work: reinstall torch for this machine"
            yield Finding(f"attention {name}", "problem", reason, fix)
        else:
            yield Finding(f"attention {name}", "note", reason)
    yield Finding("attention auto", "ok", f"would take {choose_attention('auto', device, dtype)}")


def compiling() -> Iterator[Finding]:
    """torch.compile, called."""
    begun = time.perf_counter()
    reason = compile_refusal(training_device()[0])
    if reason is None:
        yield Finding("torch.compile", "ok", f"compiles a function in {time.perf_counter() - begun:.0f} s")
    else:
        yield Finding("torch.compile", "note", f"{reason} (leave compile: false)")


def lora_round_trip(pipeline: Path) -> Iterator[Finding]:
    """A LoRA with random weights, written as a run writes it, loaded as plain diffusers loads it: the same output."""
    name = "LoRA round trip"
    device, _ = training_device()
    model = load_model(pipeline, max_sequence_length=16)
    model.pipeline.to(device)
    x, conditioning = _probe_input(model)
    base = _output(model, x, conditioning)
    model.train(LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.weights.trainable:
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    trained = _output(model, x, conditioning)
    plain = load_model(pipeline, max_sequence_length=16)
    plain.pipeline.to(device)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        with with_tuned_weights(plain, Path(folder)):
            loaded = _output(plain, x, conditioning)
    change, error = (trained - base).abs().max().item(), (loaded - trained).abs().max().item()
    if not error <= LORA_TOLERANCE * max(1.0, change) < change:
        text = f"training changed the output by {change:.1e}, and loading the LoRA is off by {error:.1e}"
        yield Finding(name, "problem", text, "install the versions of diffusers and peft that pip check accepts")
    else:
        yield Finding(name, "ok", f"diffusers loads what was trained, to {error:.0e} of a change of {change:.0e}")


def _probe_input(model: DiffusionModel) -> tuple[Tensor, Conditioning]:
    noise = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return noise.to(model.device), model.encode(["a red circle", "two blue squares"])


@torch.no_grad()
def _output(model: DiffusionModel, x: Tensor, conditioning: Conditioning) -> Tensor:
    return model.predict(x, model.levels(4)[1], conditioning)
