"""No operation is wasted: what is executed is the number of evaluations times the cost of one, without adapters."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from diffalign.forecast import stand_ins
from diffalign.forecast.counter import Counter
from diffalign.forecast.dry_run import counted_config
from diffalign.forecast.fake_model import fake_model
from diffalign.forecast.rehearsal import BACKWARD, ENCODE, EVALUATE, SAMPLING, TRAINING, rehearse
from diffalign.models import published_configs
from diffalign.structures import Conditioning
from diffalign.trainers.cost import Share
from tests.forecast.test_rehearsal import settings

# Published configurations with fewer layers, of the published width.
LAYERS = {
    "num_layers": 2,
    "num_single_layers": 2,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "num_hidden_layers": 2,
    "transformer_layers_per_block": [1, 1, 1],
    "dual_attention_layers": [0],
}
MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "qwen": "Qwen/Qwen-Image",
    "z_image": "Tongyi-MAI/Z-Image-Turbo",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "flux2": "black-forest-labs/FLUX.2-dev",
    "klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
    "chroma": "lodestones/Chroma1-HD",
    "cogview4": "THUDM/CogView4-6B",
}
GUIDED = {"guidance_scale": 3.0}
DDIM = {"plan": {"preset": "first_steps", "num_steps": 3, "window_size": 1, "solver": "ddim"}}
# (trainer, model, settings)
QUICK = [
    ("flow_grpo", "flux", {"kl_beta": 0.1}),
    ("forward_rl", "sd35", {"reference_weight": 0.1, **GUIDED}),
]
SLOW = [
    ("diffusion_dpo", "sdxl", {}),
    ("refl", "sd35", GUIDED),
    ("flow_grpo", "sd15", GUIDED | DDIM),
    ("flow_grpo", "sdxl", GUIDED | DDIM),
    ("flow_grpo", "qwen", GUIDED),
    ("flow_grpo", "z_image", GUIDED),
    ("flow_grpo", "sana", GUIDED),
    ("forward_rl", "flux", {"preset": "awm", "plan": {"preset": "ode", "num_steps": 4}}),
    ("forward_rl", "z_image", {"preset": "dgpo"}),
    ("forward_rl", "sd15", {"ema_weight": 0.1}),
    ("diffusion_dpo", "sd35", {"loss": "orpo"}),
    ("diffusion_dpo", "flux", {}),
    ("diffusion_dpo", "qwen", {"loss": "bco"}),
    ("refl", "flux", {}),
    ("refl", "sd15", GUIDED),
    ("refl", "sana", {}),
    ("flow_grpo", "klein", GUIDED),
    ("diffusion_dpo", "flux2", {}),
    ("flow_grpo", "lumina2", GUIDED),
    ("forward_rl", "chroma", GUIDED),
    ("flow_grpo", "cogview4", GUIDED),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.fixture
def shallow(tmp_path, monkeypatch):
    """Published configurations with fewer layers."""
    folder = tmp_path / "published"
    shutil.copytree(published_configs.FOLDER, folder)
    for file in folder.rglob("*.json"):
        layers_are_read = file.parent.name == "text_encoder" and "FLUX.2" in str(file)  # the 30th of them
        if file.parent.name != "vae" and not layers_are_read:
            file.write_text(json.dumps(shortened(json.loads(file.read_text()))))
    monkeypatch.setattr(published_configs, "FOLDER", folder)


def shortened(config):
    """A configuration, and those within it, with at most as many layers as ``LAYERS`` says."""
    if not isinstance(config, dict):
        return config
    found = {key: shortened(value) for key, value in config.items()}
    for key in LAYERS.keys() & found.keys():
        if isinstance(found[key], list) or (isinstance(found[key], int) and found[key] > LAYERS[key]):
            found[key] = LAYERS[key]
    return found


@contextmanager
def first_evaluation(monkeypatch):
    """Yields the arguments of the first evaluation within the context."""
    seen, call = [], stand_ins.Remembered.__call__

    def remembering(self, *args):
        if self.part == EVALUATE and not seen:
            seen.extend(args)
        return call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stand_ins.Remembered, "__call__", remembering)
        yield seen


def cost_of_one(config, x, time, conditioning):
    """Operations of an evaluation of one image by the denoiser without adapters."""
    counter = Counter()
    model, _ = fake_model(config, counter.fake, lambda model: model.raw_denoiser.requires_grad_(False), late=True)
    first = {
        name: tensor[:1]  # lengths of prompts have values
        for name, tensor in conditioning.tensors.items()
    }
    with counter, torch.no_grad(), counter.watched() as seen:
        model.evaluate(x.new_empty(1, *x.shape[1:]), time.new_empty(1), Conditioning(first, conditioning.shared))
    return seen.flops


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("trainer", "model", "more"), CASES)
def test_what_is_executed_is_within_3_percent_of_the_floor(trainer, model, more, tmp_path, monkeypatch):
    sizes = {"resolution": 256, "max_sequence_length": 64, "mixed_precision": "bf16", "base_precision": "bf16"}
    sizes |= {"max_sequence_length": None} if model in ("sd15", "sdxl") else {}
    entry, config = settings(trainer, MODELS[model], tmp_path, **sizes, **more)
    with first_evaluation(monkeypatch) as seen:
        found = rehearse(entry, config)
    one = cost_of_one(config, *seen)
    work = entry.cost.iteration(counted_config(config), Share(), 0, 1)

    assert found.calls.get((SAMPLING, EVALUATE), 0) == work.sampling
    assert found.flops.get((SAMPLING, EVALUATE), 0) == pytest.approx(work.sampling * one, rel=0.03)
    assert found.calls[TRAINING, EVALUATE] == work.training + work.comparing
    assert found.flops[TRAINING, EVALUATE] == pytest.approx((work.training + work.comparing) * one, rel=0.03)
    prompts = 4 if trainer == "diffusion_dpo" else config.num_groups
    encoded = sum(count for (_, part), count in found.calls.items() if part == ENCODE)
    assert 0 < encoded <= prompts + 1, "each prompt once, and the empty one"
    if trainer != "refl":  # whose gradients pass through the VAE
        # Through activations only: as many operations as forward, half as many more in attention, and the adapter's.
        assert found.flops[TRAINING, BACKWARD] < 1.25 * work.training * one
