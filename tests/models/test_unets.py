"""SD 1.5, SD 2 and SDXL against diffusers' own pipelines."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from diffalign.diffusion.parameterization import add_noise, target
from diffalign.diffusion.plan import Plan, Row
from diffalign.models import LoraConfig, load_model
from diffalign.models.pipeline_call import Sampled, pipeline_call
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.models.sd import SDModel
from diffalign.models.sdxl import SDXLModel
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Guidance
from tests.models import tiny_unet_pipelines as tiny
from tests.models.published_configs import SD15_SCHEDULER

TEXTS = ["a red circle", "a blue square left of a yellow circle", "three triangles"]
STEPS = 5
NAMES = list(tiny.FAMILIES)

# abar of SD's schedule, literally: betas are squares of equally spaced roots.
ABAR = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)


@pytest.fixture(scope="module")
def models(tiny_pipelines):
    """No test may change them."""
    return {name: load_model(folder) for name, folder in tiny_pipelines.items()}


@pytest.fixture
def ddim(tiny_pipelines):
    """A family's pipeline as plain diffusers loads it, sampled by DDIM."""

    def load(name, **changes):
        pipe = DiffusionPipeline.from_pretrained(tiny_pipelines[name])
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def noise_of(model):
    own = torch.arange(len(TEXTS))
    addresses = NoiseKeys(KeyedRNG(0), "evaluation", 0, own, torch.zeros_like(own))
    return addresses, addresses.start(model.latent_shape())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_our_ode_draws_the_pipelines_images(models, ddim, name, guidance_scale):
    model = models[name]
    addresses, noise = noise_of(model)
    expected = ddim(name)(
        TEXTS, latents=noise, num_inference_steps=STEPS, guidance_scale=guidance_scale, output_type="pt"
    ).images
    route = SamplingPlan(
        ode_plan(STEPS), model.levels(STEPS), Guidance(guidance_scale, PromptEmbeddingCache(model).empty)
    )
    parts = generate(model, route, model.encode(TEXTS), torch.arange(len(TEXTS)), addresses, size=2)
    images = torch.cat([images for _, images in parts])
    assert images.shape == (len(TEXTS), 3, 16, 16)
    assert images.std() > 0.01
    assert (images - expected).abs().max() < 1e-4


def test_uniform_steps_are_trailing_ones(models, ddim):
    model, pipe = models["sd2"], ddim("sd2", timestep_spacing="trailing")
    _, noise = noise_of(model)
    expected = pipe(TEXTS, latents=noise, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent").images
    latents = sample(model, SamplingPlan(ode_plan(STEPS), model.levels(STEPS, "uniform")), model.encode(TEXTS), noise)
    assert (latents - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_leading_levels_of_the_published_schedulers(models, name):
    levels = models[name].levels(50)
    times = [*range(981, 0, -20), 0]
    assert levels.time.tolist() == times
    # set_alpha_to_one is false: the last level is that of timestep 0, which still has some noise.
    alpha = np.sqrt(ABAR[times])
    assert np.abs(levels.alpha.numpy() - alpha).max() < 1e-6
    assert np.abs(levels.sigma.numpy() - np.sqrt(1 - ABAR[times])).max() < 1e-5
    assert models[name].levels(50, "uniform").time.tolist() == [*range(999, 0, -20), 0]


def test_alpha_one_at_the_end_and_other_spacings_where_the_scheduler_says_so():
    pipe = tiny.sd15()
    pipe.scheduler = DDIMScheduler(set_alpha_to_one=True, steps_offset=1, clip_sample=False)
    levels = SDModel(pipe).levels(4)
    assert levels.time.tolist() == [751, 501, 251, 1, 0]
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert SDModel(pipe).levels(4).time.tolist() == [999, 749, 499, 249, 0]


def test_linspace_timesteps_which_ddim_cannot_step_over_are_leading_ones(models):
    pipe = tiny.sd15()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(SD15_SCHEDULER | {"timestep_spacing": "linspace"})
    assert torch.equal(SDModel(pipe).levels(10).time, models["sd15"].levels(10).time)
    call = pipeline_call(SDModel(pipe), Sampled(10))
    assert 'timestep_spacing="leading"' in call.setup[0]


@pytest.mark.parametrize("solver", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_solver_of_the_pipeline_does_not_change_the_levels(models, solver):
    pipe = tiny.sd15()
    pipe.scheduler = solver.from_config(SD15_SCHEDULER | {"timestep_spacing": "leading"})
    levels, expected = SDModel(pipe).levels(10), models["sd15"].levels(10)
    assert torch.equal(levels.time, expected.time)
    assert torch.equal(levels.alpha, expected.alpha)


def test_zero_terminal_signal_starts_at_pure_noise():
    pipe = tiny.sd2()
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    first = SDModel(pipe).levels(4)[0]
    assert (first.alpha, first.sigma, first.time) == (0, 1, 999)


@pytest.mark.parametrize("name", NAMES)
def test_levels_of_training_add_the_schedulers_noise(models, ddim, name):
    model, scheduler = models[name], ddim(name).scheduler
    assert model.num_train_timesteps == 1000
    times = torch.tensor([0, 1, 500, 999])
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    level = model.level_at(times)
    assert level.time.tolist() == times.tolist()
    assert (add_noise(x0, noise, level) - scheduler.add_noise(x0, noise, times)).abs().max() < 1e-6
    kind = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, times)}
    wanted = kind[scheduler.config.prediction_type]
    assert (target(model.parameterization, x0, noise, level) - wanted).abs().max() < 1e-6


def test_the_parameterization_is_the_schedulers(models):
    assert {name: model.parameterization for name, model in models.items()} == {
        "sd15": "epsilon",
        "sd2": "v",
        "sdxl": "epsilon",
    }


def test_a_level_per_sample_equals_one_level_each(models):
    for model in models.values():
        _, x = noise_of(model)
        conditioning, level = model.encode(TEXTS), model.level_at(torch.tensor([3, 400, 999]))
        with torch.no_grad():
            together = model.predict(x, level, conditioning)
            alone = [model.predict(x[i : i + 1], level[i], conditioning[i : i + 1]) for i in range(3)]
        assert (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_prompts_are_encoded_as_the_pipeline_does(models, ddim, name):
    embeds, negative = ddim(name).encode_prompt(TEXTS, "cpu", 1, True)
    assert torch.equal(models[name].encode(TEXTS).tensors["embeds"], embeds)
    assert (models[name].unconditional().tensors["embeds"] - negative[:1]).abs().max() < 1e-6


def test_sdxl_encodes_as_its_pipeline_does(models, ddim):
    embeds, _, pooled, _ = ddim("sdxl").encode_prompt(TEXTS, device="cpu")
    tensors = models["sdxl"].encode(TEXTS).tensors
    assert torch.equal(tensors["embeds"], embeds)
    assert torch.equal(tensors["pooled"], pooled)
    assert tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3


@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_leads_away_from_what_its_pipeline_does(force_zeros, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        pipe = tiny.sdxl(force_zeros)
    pipe.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    _, negative, _, pooled = pipe.encode_prompt(TEXTS[0], device="cpu")
    empty = PromptEmbeddingCache(model).empty.tensors
    assert torch.equal(empty["embeds"], negative)
    assert torch.equal(empty["pooled"], pooled)
    assert bool(empty["embeds"].any()) is not force_zeros
    # A prompt that is empty is another matter: the pipeline encodes it, and so must we.
    assert model.encode([""]).tensors["embeds"].any()


def test_size_conditioning_of_sdxl_is_not_cached_for_another_size(models, monkeypatch, tmp_path):
    for resolution in (16, 32):
        monkeypatch.setattr(models["sdxl"], "resolution", resolution)
        encoded = PromptEmbeddingCache(models["sdxl"], folder=tmp_path)
        for row in (encoded(TEXTS[:1]), encoded.empty):
            assert row.tensors["time_ids"].tolist() == [[resolution, resolution, 0, 0, resolution, resolution]]


def test_a_cached_negative_follows_the_configuration_of_the_pipeline(tmp_path):
    """SDXL models with the same encoders may share a cache, and differ in their negative."""
    pipe, found = tiny.sdxl(), []
    for zeros in (True, False):
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        found.append(PromptEmbeddingCache(SDXLModel(pipe), folder=tmp_path).empty.tensors["embeds"])
    assert not found[0].any()
    assert found[1].any()


def test_sdxl_gets_the_sizes_of_each_image(models, ddim):
    model = models["sdxl"]
    _, noise = noise_of(model)
    sizes = {
        "original": torch.tensor([[40, 24], [16, 16], [301, 77]]),
        "crop": torch.tensor([[3, 5], [0, 0], [9, 1]]),
        "target": torch.tensor([[16, 16], [16, 16], [16, 8]]),
    }
    conditioning = model.with_sizes(model.encode(TEXTS), **sizes)
    route = SamplingPlan(ode_plan(STEPS), model.levels(STEPS))
    latents = sample(model, route, conditioning, noise)
    pipe = ddim("sdxl")
    for i, text in enumerate(TEXTS):
        expected = pipe(
            text,
            latents=noise[i : i + 1],
            original_size=tuple(sizes["original"][i].tolist()),
            crops_coords_top_left=tuple(sizes["crop"][i].tolist()),
            target_size=tuple(sizes["target"][i].tolist()),
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        assert (latents[i : i + 1] - expected).abs().max() < 1e-4
    plain = sample(model, route, model.encode(TEXTS), noise)
    assert (latents - plain).abs().amax((1, 2, 3)).gt(1e-3).tolist() == [True, False, True]
    assert models["sd15"].with_sizes(conditioning, **sizes) is conditioning


def test_images_are_encoded_to_the_mean_or_to_a_sample(models):
    model = models["sd15"]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    moments = model.pipeline.vae.encode(images * 2 - 1).latent_dist.parameters
    mean, log_variance = moments.chunk(2, dim=1)
    assert (model.encode_images(images) - mean * 0.7).abs().max() < 1e-6
    drawn = (mean + (log_variance / 2).exp() * noise) * 0.7
    assert (model.encode_images(images, noise) - drawn).abs().max() < 1e-6


def test_a_lora_of_the_unet_receives_gradients(tiny_pipelines):
    model = load_model(tiny_pipelines["sdxl"])
    model.train(LoraConfig(rank=2))
    _, x = noise_of(model)
    model.predict(x, model.level_at(torch.tensor([5, 500, 900])), model.encode(TEXTS)).square().mean().backward()
    named = {n: p for n, p in model.raw_denoiser.named_parameters() if p.requires_grad}
    # 2 transformer blocks on the way down, 2 in the middle, 2 x 2 on the way up; 8 projections; A and B.
    assert len(named) == 8 * 8 * 2
    assert all(p.grad.any() for n, p in named.items() if "lora_B" in n)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(tiny_pipelines, name):
    found, counts = [], []
    for on in (False, True):
        model, calls = load_model(tiny_pipelines[name]), []
        model.train(LoraConfig(rank=2))
        if on:
            model.raw_denoiser.enable_gradient_checkpointing()
        # Behind the first weights that train: what comes before them needs no second computation.
        last = model.raw_denoiser.mid_block.resnets[-1]
        last.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        _, x = noise_of(model)
        model.predict(x, model.level_at(torch.tensor([5, 500, 900])), model.encode(TEXTS)).square().mean().backward()
        found.append([p.grad for p in model.raw_denoiser.parameters() if p.requires_grad])
        counts.append(len(calls))
    assert counts == [1, 2]
    assert any(g.any() for g in found[0])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)


def test_the_safety_checker_is_not_loaded(tiny_pipelines, tmp_path):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    parts = {"safety_checker": checker, "feature_extractor": CLIPImageProcessor()}
    pipe = DiffusionPipeline.from_pretrained(tiny_pipelines["sd15"], **parts)
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).safety_checker is not None
    assert load_model(tmp_path).pipeline.safety_checker is None


def test_schedulers_that_do_not_fit_are_refused(pipeline):
    pipe = tiny.sd15()
    pipe.scheduler = pipeline.scheduler
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler: no betas .* give the pipeline a variance"):
        SDModel(pipe)
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type 'sample' is not supported; use epsilon, v_prediction"):
        SDModel(pipe)


def test_an_option_of_another_family_is_named(tiny_pipelines):
    with pytest.raises(ValueError, match="a StableDiffusionPipeline has no option max_sequence_length; leave it out"):
        load_model(tiny_pipelines["sd15"], max_sequence_length=16)


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_step_of_ddim_is_replayed_to_the_bit(models, name):
    model = models[name]
    _, noise = noise_of(model)
    plan = Plan((Row("ddim", 1.0, trained=True), Row("ddim", 0.5, trained=True), *ode_plan(2).rows))
    route = SamplingPlan(plan, model.levels(4), Guidance(2.0, model.unconditional()))
    conditioning, seen = model.encode(TEXTS), [noise]
    drawn = {}

    def observe(index, result):
        drawn[index] = result.log_prob
        seen.append(result.x_next)

    sample(model, route, conditioning, noise, draw=lambda i: noise.roll(i + 1), observe=observe)
    for index in plan.trained_steps:
        with torch.no_grad():
            again = route.replay(model, index, seen[index], conditioning, seen[index + 1])
        assert torch.equal(again.log_prob, drawn[index])
