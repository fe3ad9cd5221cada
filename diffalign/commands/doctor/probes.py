"""Checks of machine-dependent parts: attention kernels, torch.compile, and loading a LoRA with plain diffusers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffalign.commands.doctor.findings import Finding
from diffalign.device import default_device, supports_bf16
from diffalign.models import DiffusionModel, LoraConfig, load_model, with_tuned_weights
from diffalign.models.attention import LISTED, NATIVE, choose_attention, refusal
from diffalign.models.compiling import compile_refusal
from diffalign.models.editing import example_prompt
from diffalign.structures import Conditioning

# diffusers may multiply the factors of a LoRA in another order
LORA_TOLERANCE = 1e-4


def training_device() -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype that training would use."""
    device = default_device()
    if device.type == "cpu":
        return device, torch.float32
    return device, torch.bfloat16 if supports_bf16(device) else torch.float16


def attention() -> Iterator[Finding]:
    """Call every attention backend."""
    device, dtype = training_device()
    for name in LISTED:
        reason = refusal(name, device, dtype)
        if reason is None:
            yield Finding(f"attention {name}", "ok", f"trains on {device.type} in {str(dtype).removeprefix('torch.')}")
        elif name == NATIVE:
            fix = "native attention must work: reinstall torch for this machine"
            yield Finding(f"attention {name}", "problem", reason, fix)
        else:
            yield Finding(f"attention {name}", "note", reason)
    yield Finding("attention auto", "ok", f"selects {choose_attention('auto', device, dtype)}")


def compiling() -> Iterator[Finding]:
    """Compile a function with torch.compile."""
    start = time.perf_counter()
    reason = compile_refusal(training_device()[0])
    if reason is None:
        yield Finding("torch.compile", "ok", f"compiles a function in {time.perf_counter() - start:.0f} s")
    else:
        yield Finding("torch.compile", "note", f"{reason} (leave compile: false)")


def lora_round_trip(pipeline: Path) -> Iterator[Finding]:
    """Save a LoRA with random weights, load it with diffusers, and compare the model outputs."""
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
        text = f"the LoRA changes the output by {change:.1e}; after loading, the output is off by {error:.1e}"
        yield Finding(name, "problem", text, "install versions of diffusers and peft that pass `pip check`")
    else:
        yield Finding(
            name, "ok", f"diffusers reproduces the trained output, error {error:.0e} of a change of {change:.0e}"
        )


def _probe_input(model: DiffusionModel) -> tuple[Tensor, Conditioning]:
    noise = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return noise.to(model.device), Conditioning.cat(
        [model.encode_input(example_prompt(model, text).input) for text in ("a red circle", "two blue squares")]
    )


@torch.no_grad()
def _output(model: DiffusionModel, x: Tensor, conditioning: Conditioning) -> Tensor:
    return model.predict(x, model.levels(4)[1], conditioning)
