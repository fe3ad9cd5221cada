"""The package's published configurations: complete, found by hub id, and used without network or weights."""

import pytest
import torch
from torch import nn

from diffalign.models import family_names
from diffalign.models.load import pipeline_class
from diffalign.models.meta_device import model_on_meta
from diffalign.models.published_configs import FOLDER, published_config, published_folder, published_models

# Families without public weights of their own, or whose parts are those of another one here.
COUNTED = {"stabilityai/stable-diffusion-2-1": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}}


@pytest.mark.parametrize("name", published_models())
def test_a_published_model_builds_with_all_its_networks_and_schedule(name):
    model = model_on_meta(name, dtype=torch.bfloat16)
    parts = {key: part for key, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    assert {"vae", model.denoiser_name, "text_encoder"} <= parts.keys()
    assert all(p.is_meta for part in parts.values() for p in part.parameters())
    assert len(model.levels(4)) == 5
    counts = {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()}
    assert counts.items() >= COUNTED.get(name, {}).items()
    assert f"`{name.replace('/', '--')}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_family_has_a_published_model():
    kinds = {pipeline_class(published_folder(name)) for name in published_models()}
    assert kinds >= set(family_names())


@pytest.mark.parametrize(
    ("edits", "model"),
    [
        ("black-forest-labs/FLUX.1-Kontext-dev", "black-forest-labs/FLUX.1-dev"),
        ("Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image"),
    ],
)
def test_a_model_that_edits_has_the_shapes_of_the_one_that_it_was_made_from(edits, model):
    """Their code loads both into one architecture, and only the pipeline differs."""
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        assert published_config(edits, part) == published_config(model, part)


def test_what_is_not_published_is_said_by_name():
    assert published_folder("assets/shapes-sd3-nowhere") is None
    with pytest.raises(ValueError, match=r"nobody/model, unet; known: .*FLUX"):
        published_config("nobody/model", "unet")
    with pytest.raises(ValueError, match="known:"):
        published_config("Qwen/Qwen-Image", "unet")
