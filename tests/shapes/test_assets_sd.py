"""The shipped StableDiffusionPipeline: small, loadable with plain defaults, and good but improvable."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffalign.data.prompts import load_prompts
from diffalign.models import load_model
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.shapes import TAGS, judge_batch
from diffalign.structures import Guidance
from tests.conftest import PROMPTS, ROOT

PIPELINE = ROOT / "assets/shapes-sd"


@pytest.fixture(scope="module")
def model():
    return load_model(PIPELINE)


def strict(images, prompts):
    return torch.tensor([v.strict for v in judge_batch(images, [p.metadata for p in prompts])]).float()


def draw(model, prompts, guidance):
    own = torch.arange(len(prompts))
    addresses = NoiseKeys(KeyedRNG(0), "evaluation", 0, own, torch.zeros_like(own))
    route = SamplingPlan(ode_plan(8), model.levels(8), Guidance(guidance, model.unconditional()))
    conditioning = model.encode([p.text for p in prompts])
    return torch.cat([images for _, images in generate(model, route, conditioning, own, addresses, 64)])


def test_the_pipeline_is_small_and_in_half_precision():
    assert sum(f.stat().st_size for f in PIPELINE.rglob("*") if f.is_file()) <= 5.5 * 2**20
    assert json.loads((PIPELINE / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    weights = [load_file(f) for f in PIPELINE.rglob("*.safetensors")]
    assert len(weights) == 3
    assert {t.dtype for part in weights for t in part.values()} == {torch.float16}


def test_the_model_is_of_the_families_kind(model):
    assert model.parameterization == "epsilon"
    assert model.default_resolution == (64, 64)
    assert model.latent_shape() == (8, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "lowest", "highest"), [(1.0, 0.5, 0.75), (2.0, 0.65, 0.92)])
def test_the_base_is_good_but_improvable(model, guidance, lowest, highest):
    """On held-out prompts, and above chance on every task."""
    prompts = load_prompts(PROMPTS / "shapes_validation.jsonl")[::2]
    images = draw(model, prompts, guidance)
    right = strict(images, prompts)
    assert lowest <= right.mean() <= highest
    # Chance: the same images judged by the caption of another prompt of their task.
    for tag in TAGS:
        rows = [i for i, p in enumerate(prompts) if p.metadata["tag"] == tag]
        others = [prompts[i] for i in rows[1:] + rows[:1]]
        assert right[rows].mean() > strict(images[rows], others).mean(), tag


def test_plain_defaults_of_diffusers_draw_the_prompt(model):
    """No argument but the prompt: 50 steps, guidance 7.5."""
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    prompts = load_prompts(PROMPTS / "shapes_train.jsonl")[::12]
    images = pipe([p.text for p in prompts], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape[-2:] == (64, 64)
    assert strict(images, prompts).mean() >= 0.35
