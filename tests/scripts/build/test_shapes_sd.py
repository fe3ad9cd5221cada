"""The builder of the embedded StableDiffusionPipeline: what it trains with, and that it can go on."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.shapes import prompt_set

ROOT = Path(__file__).parents[3]
COMMAND = ["shapes_sd.py", "train", "--parts", str(ROOT / "assets/shapes-sd3"), "--check_per_tag", "1"]


@pytest.fixture
def build(monkeypatch):
    module = importlib.import_module("scripts.build.shapes_sd")
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "check", lambda args: None)
    return module


@pytest.fixture
def work(build, tmp_path):
    """A folder with the parts that ``latents`` leaves, of 12 scenes."""
    vae = build.AutoencoderKL.from_pretrained(ROOT / "assets/shapes-sd3/vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)
    vae.save_pretrained(tmp_path / "vae")
    prompts = prompt_set(2, held_out=False, seed=0)
    latents = torch.randn(len(prompts), 8, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    (tmp_path / "specs.json").write_text(json.dumps([p.metadata for p in prompts]))
    return tmp_path


def run(build, monkeypatch, work, name, *arguments):
    """The trained weights; ``state.pt`` of the work folder is where it stopped."""
    folders = ["--work_dir", str(work), "--output_dir", str(work / name)]
    monkeypatch.setattr(sys, "argv", [*COMMAND, *folders, "--steps", "2", "--web_steps", "2", *arguments])
    build.main()
    return load_file(work / "fp32/unet/diffusion_pytorch_model.safetensors")


def test_a_resumed_training_takes_the_very_same_steps(build, work, monkeypatch):
    whole = run(build, monkeypatch, work, "whole")
    (work / "state.pt").unlink()
    for _ in range(4):  # stopped after every step
        parts = run(build, monkeypatch, work, "parts", "--minutes", "0", "--export_every", "1")
    assert torch.load(work / "state.pt", weights_only=True)["step"] == 4
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_shipped_weights_are_half_precision_and_load_with_plain_diffusers(build, work, monkeypatch):
    run(build, monkeypatch, work, "out")
    files = list((work / "out").rglob("*.safetensors"))
    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.float16}
    pipe = build.StableDiffusionPipeline.from_pretrained(work / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.shift_factor is None
    assert pipe("a red circle", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 64, 64)


def test_muon_of_a_kernel_is_muon_of_its_matrix(build):
    generator = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(2, 6, 4, 3, 3, generator=generator)
    kernel = torch.nn.Parameter(values.clone().contiguous(memory_format=torch.channels_last))
    plain = torch.nn.Parameter(values.permute(0, 2, 3, 1).reshape(6, -1).clone())
    kernel.grad, plain.grad = gradient.clone(), gradient.permute(0, 2, 3, 1).reshape(6, -1)
    build.Muon([kernel], lr=0.1).step()
    torch.optim.Muon([plain], lr=0.1).step()
    assert not torch.equal(kernel.data, values)
    assert torch.equal(kernel.data.permute(0, 2, 3, 1).reshape(6, -1), plain.data)
    assert kernel.grad is None


def test_the_loss_of_a_perfect_denoiser_is_zero_and_of_none_at_all_the_weight(build, work, monkeypatch):
    monkeypatch.setattr(sys, "argv", COMMAND)
    args = type("Args", (), {"parts": ROOT / "assets/shapes-sd3", "work_dir": work})
    pipe = build.make_pipeline(args)
    x0, texts = torch.zeros(64, 8, 8, 8), ["a red circle"] * 64
    abar = pipe.scheduler.alphas_cumprod
    seen = []

    class Perfect(torch.nn.Module):
        def forward(self, x, t, embeds, return_dict):
            seen.append(t)
            return (x / (1 - abar[t]).sqrt().view(-1, 1, 1, 1),)  # x = sigma noise

    pipe.register_modules(unet=Perfect())
    assert build.loss_of_batch(pipe, x0, texts, torch.Generator().manual_seed(1)) < 1e-10
    pipe.unet.forward = lambda x, t, embeds, return_dict: (seen.append(t) or torch.zeros_like(x),)
    loss = build.loss_of_batch(pipe, x0, texts, torch.Generator().manual_seed(1))
    # Noise has variance 1, and 1 + sigma^2 / alpha^2 = 1 / abar.
    assert loss == pytest.approx((1 / abar[seen[-1]]).clamp_max(build.MAX_WEIGHT).mean().item(), rel=0.05)
    assert seen[-1].min() < 200
    assert seen[-1].max() > 800
