"""A trained negative prompt: its gradient, its weight sets, and a constant one on the gradient's path."""

import dataclasses

import torch
from safetensors.torch import load_file

from diffalign.structures import Guidance


def prediction(model, guidance, scale=1.0):
    x = scale * torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x, model.levels(4)[1], model.encode(["a red circle", "two squares"]), guidance)


def test_it_begins_as_the_empty_prompt_and_is_all_that_trains(model):
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
