"""A pipeline without weights has the shapes and schedules of the loaded one."""

import pytest
import torch

from diffalign.models import LoraConfig, load_model
from diffalign.models.memory import memory_needs
from diffalign.models.meta import model_on_meta
from tests.conftest import PIPELINE


@pytest.mark.parametrize("name", ["shapes", "sd15", "sdxl"])
def test_a_model_on_meta_needs_what_the_loaded_one_needs(name, tiny_pipelines):
    path = PIPELINE if name == "shapes" else tiny_pipelines[name]
    options = {"max_sequence_length": 16} if name == "shapes" else {}
    shapes, loaded = (load(path, **options) for load in (model_on_meta, load_model))
    for model in (shapes, loaded):
        model.train(LoraConfig(rank=4))
    assert memory_needs(shapes, 3, copies=1) == memory_needs(loaded, 3, copies=1)
    assert all(p.is_meta for p in shapes.raw_denoiser.parameters())
    assert shapes.latent_shape() == loaded.latent_shape()
    assert torch.equal(shapes.levels(5).time, loaded.levels(5).time)
