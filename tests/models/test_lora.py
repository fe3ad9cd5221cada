"""The LoRA as it leaves the trainer: what plain diffusers makes of it in a fresh process."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.models import LoraConfig
from diffalign.models.lora import learned_nothing
from diffalign.rollout.sampler import Route, ode_plan, sample
from tests.conftest import PIPELINE

TEXTS = ["a red circle", "a blue square"]
STEPS = 4

# Plain diffusers, nothing of this package. argv: pipeline, folders; each gets the images that its weights draw.
FRESH = """
import sys, torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from pathlib import Path

pipeline, *folders = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
noise = load_file(Path(folders[0]).parent / "noise.safetensors")["noise"]

def draw(pipe, **kwargs):
    return pipe(TEXTS, latents=noise, num_inference_steps=STEPS, guidance_scale=1.0, max_sequence_length=16,
                output_type="pt", **kwargs).images

base = draw(pipe)
for folder in folders:
    if (Path(folder) / "transformer").exists():
        full = SD3Transformer2DModel.from_pretrained(Path(folder) / "transformer")
        other = DiffusionPipeline.from_pretrained(pipeline, transformer=full, torch_dtype=torch.float32)
        other.set_progress_bar_config(disable=True)
        save_file({"image": draw(other)}, Path(folder) / "image.safetensors")
        continue
    pipe.load_lora_weights(folder)
    loaded = {n for n, _ in pipe.transformer.named_parameters() if "lora_" in n}
    stored = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
    assert len(loaded) == len(stored), (len(loaded), len(stored))
    image = draw(pipe)
    off = draw(pipe, joint_attention_kwargs={"scale": 0.0})
    print("scale 0 is the base:", torch.equal(off, base))
    save_file({"image": image}, Path(folder) / "image.safetensors")
    pipe.unload_lora_weights()
"""


def trained(model, config, folder):
    """Disturbs the trainable weights, saves them, and returns the model's own images."""
    model.train(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save(folder)
    noise = torch.randn(len(TEXTS), *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    latents = sample(model, Route(ode_plan(STEPS), model.levels(STEPS)), model.encode(TEXTS), noise)
    with torch.no_grad():
        return model.decode(latents), noise


CONFIGS = {
    "rank": LoraConfig(rank=4),
    "alpha": LoraConfig(rank=4, alpha=16.0),
    "targets": LoraConfig(rank=2, alpha=1.0, targets=("attn.to_q", "ff.net.2", "proj_out")),
    "full": LoraConfig(rank=0),
}


def test_a_fresh_process_draws_the_trainers_images(tmp_path):
    from safetensors.torch import save_file

    from diffalign.models import load_model

    expected = {}
    for name, config in CONFIGS.items():
        expected[name], noise = trained(load_model(PIPELINE, max_sequence_length=16), config, tmp_path / name)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    folders = [str(tmp_path / name) for name in CONFIGS]
    run = subprocess.run(
        [sys.executable, "-c", f"TEXTS, STEPS = {TEXTS!r}, {STEPS}\n{FRESH}", str(PIPELINE), *folders],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("scale 0 is the base: True") == len(CONFIGS) - 1
    assert "led to unexpected keys" not in run.stderr
    assert "led to missing keys" not in run.stderr
    images = {name: load_file(tmp_path / name / "image.safetensors")["image"] for name in CONFIGS}
    for name, image in images.items():
        assert (image - expected[name]).abs().max() < 1e-5, name
    assert (images["rank"] - images["alpha"]).abs().max() > 1e-3, "alpha must matter"


def test_metadata_tells_rank_and_alpha(model, tmp_path):
    trained(model, CONFIGS["alpha"], tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert metadata["transformer.r"] == 4
    assert metadata["transformer.lora_alpha"] == 16.0


def test_an_adapter_that_learned_nothing_is_reported(model, tmp_path):
    model.train(LoraConfig(rank=2))
    path = model.save(tmp_path)
    with pytest.warns(UserWarning, match="this LoRA changes nothing"):
        assert learned_nothing(path)


def test_injection_depends_on_the_seed_alone(model):
    before = torch.random.get_rng_state()
    model.train(LoraConfig(rank=2), seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    first = next(p for n, p in model.raw_denoiser.named_parameters() if "lora_A" in n)
    assert first.std() > 0


def test_unknown_target_is_named(model):
    with pytest.raises(ValueError, match=r"no layer is named to_qq; layers of a block: .*attn\.to_q"):
        model.train(LoraConfig(targets=("to_qq",)))


@pytest.mark.parametrize(("setting", "message"), [({"rank": -1}, "must be 0"), ({"alpha": 0.0}, "must be positive")])
def test_settings_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**setting)
