"""Recomputing activations of the VAE's decoder: the same gradient to the bit, in less memory."""

import copy

import pytest
import torch

from diffalign.models.load import load_model
from diffalign.models.performance import checkpoint_decoder
from tests.forecast.measured import peak_of
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES


def gradient(model, latents):
    latents = latents.clone().requires_grad_()
    model.decode(latents).square().mean().backward()
    return latents.grad


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_dev", "qwen_image", "sana", "z_image", "flux2_klein"])
def test_gradients_of_a_checkpointed_decoder_are_equal(name, tmp_path):
    family, folder = FAMILIES[name], "assets/shapes-sd3"
    if family.build is not None:
        tiny.write(family.build, folder := tmp_path / "model")
    model = load_model(folder, **family.options)
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    plain = gradient(model, latents)
    found = [checkpoint_decoder(model.pipeline.vae) for _ in range(2)]  # a model may be trained again
    assert found == [name != "qwen_image"] * 2  # whose layers keep a state
    assert plain.any()
    assert torch.equal(gradient(model, latents), plain)
    with torch.no_grad():
        model.decode(latents)


def test_the_decoder_s_layers_need_less_than_its_blocks():
    """Of an image of many pixels for its network, as at full size."""
    model = load_model("assets/shapes-sd3")
    vae = model.pipeline.vae.requires_grad_(False)
    latents = torch.randn(1, vae.config.latent_channels, 64, 64)

    def peak(change):
        model.pipeline.vae = changed = copy.deepcopy(vae)
        change(changed)
        return peak_of(lambda: gradient(model, latents))

    plain = peak(lambda vae: None)
    blocks = peak(lambda vae: vae.enable_gradient_checkpointing())
    layers = peak(checkpoint_decoder)
    assert layers < blocks < plain
