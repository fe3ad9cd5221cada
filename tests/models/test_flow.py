"""What is particular to FLUX.1, Qwen-Image, SANA and Z-Image."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

from diffalign.models import load_model
from diffalign.models.flow import image_ids, pack, unpack
from diffalign.models.flux import FluxModel
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.models.sana import SanaModel
from diffalign.models.tensor_cache import TensorCache
from tests.models import tiny_flow_pipelines as tiny_flow
from tests.models.families import FAMILIES, images_of, noise_of

TEXTS = ["a red circle", "a blue square left of a yellow circle", "three triangles"]


@pytest.fixture(scope="module")
def loaded(family_pipelines):
    """A family's model, with other options than usual; no test may change it."""
    return lambda name, **options: load_model(family_pipelines[name], **{**FAMILIES[name].options, **options})


def test_packing_is_the_pipelines_and_unpacking_its_inverse():
    latents = torch.randn(2, 4, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), latents)


def test_tokens_of_the_image_are_where_the_pipeline_puts_them():
    ids = image_ids(3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(ids, FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32))


@pytest.mark.parametrize("schedule", ["pipeline", "uniform"])
def test_flux_shifts_its_sigmas_by_the_size_of_the_image(loaded, schedule):
    model = loaded("flux_dev")
    for side in (16, 256, 512):
        tokens = (side // 4) ** 2  # the tiny VAE halves, and a token has 2 x 2 latents
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        sigma = np.linspace(1, 1 / 5, 5)
        expected = [*(math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)), 0]
        assert np.abs(model.levels(5, schedule, (side, side)).sigma.numpy() - expected).max() < 1e-6


def test_schnell_does_not_shift(loaded):
    assert np.abs(loaded("flux_schnell").levels(4).sigma.numpy() - [1, 0.75, 0.5, 0.25, 0]).max() < 1e-6


def test_dev_embeds_its_guidance_and_schnell_does_not(loaded, family_pipelines):
    family, draws = FAMILIES["flux_dev"], {}
    pipe = FluxPipeline.from_pretrained(family_pipelines["flux_dev"])
    pipe.set_progress_bar_config(disable=True)
    for scale in (None, 1.0, 7.0):
        model = loaded("flux_dev", embedded_guidance=scale)
        noise = noise_of(model, len(TEXTS))
        draws[scale] = images_of(family, model, noise, TEXTS)
        guidance = {} if scale is None else {"guidance_scale": scale}
        expected = pipe(
            TEXTS, latents=pack(noise), num_inference_steps=4, output_type="pt", **family.call, **guidance
        ).images
        assert (draws[scale] - expected).abs().max() < 1e-5
    assert (draws[1.0] - draws[7.0]).abs().max() > 1e-4
    assert torch.equal(draws[None], images_of(family, loaded("flux_dev", embedded_guidance=3.5), noise, TEXTS))
    with pytest.raises(ValueError, match=r"embedded_guidance 3\.5: this model has no guidance embedding"):
        loaded("flux_schnell", embedded_guidance=3.5)


def test_ids_of_the_text_have_no_batch_axis_and_survive_the_cache_on_disk(loaded, tmp_path):
    model = loaded("flux_dev")
    first, second = PromptEmbeddingCache(model), PromptEmbeddingCache(model)
    first.cache = second.cache = TensorCache(tmp_path)
    made = first(TEXTS)
    model.encode = lambda texts: pytest.fail("was on disk")
    kept = second(TEXTS)
    assert kept.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(kept.tensors[key], made.tensors[key]) for key in made.tensors)
    assert made.shared["text_ids"].shape == (24, 3)
    assert torch.equal(kept[1:].shared["text_ids"], made.shared["text_ids"])


def test_one_step_needs_a_schedule_that_has_it(loaded):
    """The pipeline of Qwen-Image divides by zero, and returns black images."""
    assert len(loaded("flux_dev").levels(1)) == 2
    with pytest.raises(ValueError, match=r"num_steps 1: .*shift_terminal, which takes two; give 2 or more"):
        loaded("qwen_image").levels(1)
    assert len(loaded("qwen_image").levels(2)) == 3


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "z_image"])
def test_sizes_that_are_not_whole_tokens_are_refused(loaded, name):
    with pytest.raises(ValueError, match=r"resolution 18 x 18: sides of this model's images are multiples of 4 pixels"):
        loaded(name, resolution=18).latent_shape()


@pytest.mark.parametrize(("name", "factor"), [("flux_dev", 2), ("qwen_image", 2), ("z_image", None)])
def test_the_default_size_is_the_pipelines(family_pipelines, name, factor):
    side = 128 * factor if factor else 1024
    assert load_model(family_pipelines[name]).default_resolution == (side, side)


def test_latents_of_flux_are_shifted_and_scaled(loaded):
    model = loaded("flux_dev")
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    found = model.pipeline.vae.encode(images * 2 - 1).latent_dist
    assert (model.encode_images(images) - (found.mean - 0.1159) * 0.3611).abs().max() < 1e-6
    drawn = (found.mean + found.std * noise - 0.1159) * 0.3611
    assert (model.encode_images(images, noise) - drawn).abs().max() < 1e-6


def test_latents_of_qwen_image_are_normalised_by_channel(loaded):
    model = loaded("qwen_image")
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    found = model.pipeline.vae.encode(images[:, :, None] * 2 - 1).latent_dist
    mean, std = torch.tensor([-0.7, 0.1, 0.4, -0.2]), torch.tensor([2.8, 1.4, 2.3, 1.9])
    for latents, given in ((found.mean, None), (found.mean + found.std * noise[:, :, None], noise)):
        expected = (latents[:, :, 0] - mean[:, None, None]) / std[:, None, None]
        assert (model.encode_images(images, given) - expected).abs().max() < 1e-6


def test_qwen_image_keeps_the_norm_of_each_token_under_guidance(loaded):
    against, towards = torch.randn(2, 2, 4, 4, 6)
    guided = loaded("qwen_image").guide(against, towards, 4.0)
    assert torch.allclose(pack(guided).norm(dim=-1), pack(towards).norm(dim=-1), atol=1e-5)
    plain = against + 4 * (towards - against)
    assert torch.allclose(
        torch.nn.functional.cosine_similarity(pack(guided), pack(plain), dim=-1), torch.ones(2, 6), atol=1e-5
    )


@pytest.mark.parametrize("name", ["qwen_image", "sana"])
def test_padding_does_not_show(loaded, name):
    short, long = loaded(name), loaded(name, max_sequence_length=40)
    noise = noise_of(short, len(TEXTS))
    with torch.no_grad():
        outputs = [m.predict(noise, m.levels(4)[1], m.encode(TEXTS)) for m in (short, long)]
    tensors = long.encode(TEXTS).tensors
    assert tensors["embeds"].shape[1] == 40
    assert not tensors["mask"].all()
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_sana_draws_the_same_with_the_other_scheduler(loaded, family_pipelines):
    pipe = tiny_flow.SanaPipeline.from_pretrained(family_pipelines["sana"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model, family = SanaModel(pipe, **FAMILIES["sana"].options), FAMILIES["sana"]
    noise = noise_of(model, len(TEXTS))
    images = pipe(TEXTS, latents=noise, num_inference_steps=4, output_type="pt", **family.call).images
    ode = type(family)(None)
    assert (images_of(ode, model, noise, TEXTS, 4) - images).abs().max() < 1e-5
    # What the published scheduler is asked for as "uniform", which it does not know itself.
    assert (loaded("sana").levels(4, "uniform").sigma - model.levels(4, "uniform").sigma).abs().max() < 1e-6


def test_sana_prompts_stand_behind_the_instruction_and_the_empty_one_does_not(loaded):
    model = loaded("sana")
    embeds, mask, negative, negative_mask = model.pipeline.encode_prompt(
        "a red circle", max_sequence_length=24, complex_human_instruction=model.instruction
    )
    assert "Enhanced prompt" in model.instruction[0]
    assert torch.equal(model.encode(["a red circle"]).tensors["embeds"], embeds)
    assert torch.equal(model.unconditional().tensors["embeds"], negative)
    assert torch.equal(model.unconditional().tensors["mask"], negative_mask)
    assert not torch.equal(mask, negative_mask)


def test_schedulers_without_flow_sigmas_are_refused():
    pipe = tiny_flow.flux_dev()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"FluxPipeline with a DDIMScheduler: no flow sigmas .* give the pipeline"):
        FluxModel(pipe)
