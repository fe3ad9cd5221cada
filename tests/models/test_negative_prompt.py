"""Trained negative prompts: gradients, weight sets, saving, and detached negatives."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffalign import ReFLConfig
from diffalign.models import load_model
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.negative_prompt import NegativePrompt
from diffalign.models.weights import POLICY
from diffalign.report.run_report import Report
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Conditioning, Guidance
from tests.models.families import FAMILIES, NEGATIVE, noise_of, packed


def prediction(model, guidance, scale=1.0):
    x = scale * torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x, model.levels(4)[1], model.encode(["a red circle", "two squares"]), guidance)


def test_it_starts_as_the_empty_prompt_and_only_it_trains(model):
    before = prediction(model, Guidance(3.0, model.unconditional()))
    negative = model.train_negative()
    guidance = Guidance(3.0, negative.conditioning(negative()))
    after = prediction(model, guidance)
    torch.testing.assert_close(after, before)
    after.square().mean().backward()
    assert all(p.grad.norm() > 0 for p in negative.parameters())
    assert not any(p.requires_grad for p in model.raw_denoiser.parameters())


def test_the_reference_is_its_start(model, tmp_path):
    negative = model.train_negative()
    start = {name: p.detach().clone() for name, p in negative.trained.items()}
    with torch.no_grad():
        for p in negative.parameters():
            p += 1
    with model.using("reference"):
        assert all(torch.equal(negative.trained[name], value) for name, value in start.items())
    saved = load_file(model.save(tmp_path))
    torch.testing.assert_close(saved["negative_prompt_embeds"], start["embeds"] + 1)


def test_a_detached_negative_is_the_same_output_with_less_gradient(model):
    negative = model.train_negative()
    guidance = Guidance(3.0, negative.conditioning(negative()))
    full = prediction(model, guidance)
    part = prediction(model, dataclasses.replace(guidance, detached=True))
    torch.testing.assert_close(part, full)
    assert full.requires_grad
    assert not part.requires_grad


# In every family -----------------------------------------------------------------------------------------------------

TEXT, STEPS, SCALE = 'a "red" circle', 3, 3.0


@pytest.fixture(params=NEGATIVE)
def trained(request, family_pipelines):
    """(family name, model, negative prompt) with the prompt moved from its initial value."""
    model = load_model(family_pipelines[request.param], **FAMILIES[request.param].options)
    negative = model.train_negative()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in negative.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return request.param, model, negative


def images(family, model, guidance):
    route = SamplingPlan(ode_plan(STEPS), model.levels(STEPS), guidance)
    with torch.no_grad():
        return model.decode(sample(model, route, model.encode([TEXT]), noise_of(model, 1)))


def call_of(pipe, family, noise, monkeypatch):
    """Patch the pipeline's calls with the arguments that the card leaves to the reader."""
    kind = type(pipe)
    small = {"latents": packed(pipe, noise), "num_inference_steps": STEPS, "output_type": "pt", **family.call}
    original = kind.__call__
    call = functools.wraps(original)(lambda self, *args, **kwargs: original(self, *args, **{**small, **kwargs}))
    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_: pipe)


def test_a_card_says_how_a_plain_pipeline_draws_with_it(trained, plain, tmp_path, monkeypatch):
    name, model, negative = trained
    family = FAMILIES[name]
    drawn = images(family, model, Guidance(SCALE, negative.conditioning(negative())))
    model.save(tmp_path)
    args = ReFLConfig(model="model", output_dir=tmp_path, guidance_scale=SCALE, eval_num_steps=STEPS)
    report = Report(model, args, "refl", POLICY)
    report.shown = SimpleNamespace(texts=[TEXT], images=torch.zeros(1, 3, 8, 8))
    call_of(plain(name), family, noise_of(model, 1), monkeypatch)
    found: dict = {}
    exec(report._card("", []).load_snippet, found)
    assert (found["image"] - drawn[0]).abs().max() < 3e-5
    plain_guidance = images(family, model, Guidance(SCALE, model.unconditional()))
    assert (drawn - plain_guidance).abs().max() > 1e-3, "training must matter"


@pytest.mark.parametrize("trained", ["sd3", "z_image"], indirect=True)  # all of it is saved, or its text alone
def test_a_saved_negative_prompt_is_restored(trained, family_pipelines, tmp_path):
    name, model, _ = trained
    file = model.save(tmp_path)
    again = load_model(family_pipelines[name], **FAMILIES[name].options)
    with with_tuned_weights(again, tmp_path):
        found = again.negative.conditioning(again.negative())
        torch.testing.assert_close(again.negative_arguments(found), load_file(file), rtol=0, atol=0)
        with again.using("reference"):
            start = again.unconditional().tensors["embeds"]
            torch.testing.assert_close(again.negative()["embeds"], start.float(), rtol=0, atol=0)
    assert again.negative is None


def test_gradients_reach_its_text_and_nothing_else(trained):
    name, model, negative = trained
    guidance = Guidance(SCALE, negative.conditioning(negative()))
    model.predict(noise_of(model, 1), model.levels(4)[1], model.encode([TEXT]), guidance).square().mean().backward()
    gradient, row = negative.trained["embeds"].grad[0], negative.rest
    assert not any(p.requires_grad for p in model.raw_denoiser.parameters())
    reached = gradient.abs().sum(1) > 0
    everything = torch.arange(len(gradient)) >= 0
    text = row["mask"][0].bool() if "mask" in row else everything
    text = torch.arange(len(gradient)) < row["length"] if "length" in row else text
    # The tiny tokenizer of SANA says nothing of an empty prompt, and attention to nothing is to all alike.
    assert torch.equal(reached, text if text.any() else everything), name


def test_a_text_without_embeddings_cannot_be_trained():
    with pytest.raises(ValueError, match="a negative prompt has embeds, pooled, and this model's has none of them"):
        NegativePrompt(Conditioning({"words": torch.zeros(1, 3)}))
