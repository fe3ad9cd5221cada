"""Guidance scales have the meaning of the family's pipeline wherever they can be set."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline

from diffalign import DiffusionDPOConfig, FlowGRPOConfig, ReFLConfig
from diffalign.commands.evaluate_config import EvaluationConfig, resolve
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.models import get_family, load_model
from diffalign.models.load import default_guidance
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.models.sd import SDModel
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Guidance
from tests.conftest import PIPELINE, PROMPTS
from tests.models import tiny_flow_pipelines as tiny_flow
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES, GUIDED, noise_of, packed
from tests.models.plain_diffusers import TEXTS

STEPS = 3
SCALES = (0.0, 0.5, 1.0, 1.5, 4.0)
CONFIGS = (FlowGRPOConfig, DiffusionDPOConfig, ReFLConfig)


def draw(model, family, noise, guidance):
    route = SamplingPlan(ode_plan(STEPS, family.solver), model.levels(STEPS), guidance)
    return model.decode(sample(model, route, model.encode(TEXTS), noise))


@pytest.mark.parametrize("name", GUIDED)
def test_every_scale_draws_the_pipelines_images(family_pipelines, plain, name):
    family, pipe = FAMILIES[name], plain(name)
    model = load_model(family_pipelines[name], **family.options)
    noise = noise_of(model, len(TEXTS))
    for scale in SCALES:
        call = {**family.call, **family.guided(scale, len(TEXTS))}
        expected = pipe(
            prompt=list(TEXTS), latents=packed(pipe, noise), num_inference_steps=STEPS, output_type="pt", **call
        ).images
        # At 1 there is no negative, to save an encoding that most families do not need.
        negative = model.unconditional() if scale != 1 else None
        assert (draw(model, family, noise, Guidance(scale, negative)) - expected).abs().max() < 1e-5, scale
        assert (draw(model, family, noise, Guidance(scale)) - expected).abs().max() < 1e-5, scale
        assert (draw(model, family, noise, PromptEmbeddingCache(model).guidance(scale)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", GUIDED)
def test_a_scale_that_does_not_guide_costs_one_evaluation(family_pipelines, name):
    model, batches = load_model(family_pipelines[name], **FAMILIES[name].options), []
    evaluate = model.evaluate
    model.evaluate = lambda x, time, conditioning: batches.append(len(x)) or evaluate(x, time, conditioning)
    negative = model.unconditional()
    with torch.no_grad():
        for scale in SCALES:
            model.predict(noise_of(model, 2), model.levels(4)[1], model.encode(TEXTS), Guidance(scale, negative))
    guided = [scale > (0 if name == "z_image" else 1) for scale in SCALES]
    assert batches == [4 if doubled else 2 for doubled in guided]


@pytest.mark.parametrize("distilled", [False, True])
def test_guidance_of_a_pipeline_that_has_none_is_refused(family_pipelines, distilled):
    name = "flux2_klein" if distilled else "flux2_dev"
    pipe = DiffusionPipeline.from_pretrained(family_pipelines[name])
    if distilled:
        pipe.register_to_config(is_distilled=True)
    model = get_family(type(pipe).__name__)(pipe, **FAMILIES[name].options)
    assert not model.guides(1.0)
    for ask in (model.guides, model.guidance_arguments, PromptEmbeddingCache(model).guidance):
        with pytest.raises(ValueError, match=r"guidance_scale 2: a Flux2\w*Pipeline has no classifier-free guidance"):
            ask(2.0)


@pytest.mark.parametrize(("distilled", "scale"), [(False, 4.0), (True, 1.0)])
def test_a_distilled_model_has_no_guidance_by_default(tmp_path, distilled, scale):
    """Its pipeline ignores the scale, which is refused above 1."""
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert default_guidance(tmp_path) == scale


@pytest.mark.parametrize("build", [tiny.sdxl, tiny_flow.cogview4], ids=["sdxl", "cogview4"])
def test_a_negative_has_the_sizes_of_the_image(build, monkeypatch):
    """As the pipelines do where no negative sizes are given."""
    pipe = build()
    model = get_family(type(pipe).__name__)(pipe, resolution=16)
    rows, seen = model.at_size(model.encode(["a star", "a circle"]), (32, 16)), []
    monkeypatch.setattr(model, "evaluate", lambda x, time, given: seen.append(given.tensors[model.sizes_name]) or x)
    model.predict(noise_of(model, 2), model.levels(2)[0], rows, Guidance(4.0))
    assert seen[0].tolist() == [[32, 16, 0, 0, 32, 16]] * 4


def test_a_unet_with_a_guidance_embedding_gets_the_scale():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        pipe = tiny._sd(tiny.unet(time_cond_proj_dim=8), tiny.clip(tiny.CLIPTextModel, 24), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    model, drawn = SDModel(pipe), {}
    noise = noise_of(model, len(TEXTS))
    for scale in SCALES:
        expected = pipe(
            list(TEXTS), latents=noise, num_inference_steps=STEPS, guidance_scale=scale, output_type="pt"
        ).images
        drawn[scale] = draw(model, FAMILIES["sd15"], noise, Guidance(scale))
        assert (drawn[scale] - expected).abs().max() < 1e-5, scale
    assert (drawn[0.0] - drawn[4.0]).abs().max() > 1e-5


# Where a scale is a setting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["guidance_scale", "embedded_guidance"])
@pytest.mark.parametrize("kind", [*CONFIGS, EvaluationConfig])
def test_scales_without_a_meaning_are_refused(kind, field, scale):
    given = {"prompts": PROMPTS / "shapes_validation.jsonl", "rewards": ("shapes",)} if kind is EvaluationConfig else {}
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {field} must be .*, got {scale:g}"):
        kind(model=str(PIPELINE), **given, **{field: scale})


def test_the_noun_itself_refuses_a_negative_scale():
    with pytest.raises(ValueError, match="must be 0 or more"):
        Guidance(-1.0)


@pytest.mark.parametrize("name", ["sd15", "flux_dev", "z_image"])
def test_left_out_it_is_the_familys_own_for_no_guidance(family_pipelines, name, tmp_path):
    given = {"prompts": PROMPTS / "shapes_validation.jsonl", "rewards": ("shapes",)}
    config = resolve(EvaluationConfig(model=str(family_pipelines[name]), **given), tmp_path, 1)
    assert config.guidance_scale == (0.0 if name == "z_image" else 1.0)
    model = load_model(family_pipelines[name], **FAMILIES[name].options)
    assert not model.guides(config.guidance_scale)
    assert not model.guides(None)


def test_a_gradient_is_divided_by_what_guidance_multiplies_it_with(family_pipelines):
    for name, expected in (("sd15", (1.0, 1.0, 4.0)), ("z_image", (1.0, 1.5, 5.0))):
        model = load_model(family_pipelines[name], **FAMILIES[name].options)
        assert tuple(model.guidance_factor(scale) for scale in (0.0, 0.5, 4.0)) == expected
        against, towards = torch.zeros(1), torch.ones(1)
        assert model.guide(against, towards, 4.0).item() == expected[-1]


@pytest.mark.parametrize("changes", [{"compensate": True}, {"negative": True}])
def test_recipes_that_need_guidance_refuse_a_scale_without_one(changes):
    recipe = RecipeConfig("draft_k", num_steps=2, gradient_steps=1, **changes)
    with pytest.raises(ValueError, match="guidance"):
        ReFLConfig(model=str(PIPELINE), recipe=recipe, guidance_scale=0.0, rewards={"shapes": 1.0}).validate()
