"""A pipeline without weights has the shapes and schedules of the loaded one, and is built without a word."""

import logging

import pytest
import torch
from torch import nn

from diffalign.fsdp import units
from diffalign.models import LoraConfig, load_model
from diffalign.models.meta_device import model_on_meta
from diffalign.models.weight_memory import Spread, gathered_bytes, size_of
from tests.conftest import PIPELINE


def tensors(model):
    """Name, shape, dtype and use of every weight and buffer."""
    found = {}
    for part, network in model.pipeline.components.items():
        if isinstance(network, nn.Module):
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
                found[f"{part}.{name}"] = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
    return found


@pytest.mark.parametrize("name", ["shapes", "sd15", "sdxl"])
def test_a_model_on_meta_has_the_weights_of_the_loaded_one(name, tiny_pipelines):
    path = PIPELINE if name == "shapes" else tiny_pipelines[name]
    options = {"max_sequence_length": 16} if name == "shapes" else {}
    shapes, loaded = (load(path, **options) for load in (model_on_meta, load_model))
    for model in (shapes, loaded):
        model.train(LoraConfig(rank=4))
    assert tensors(shapes) == tensors(loaded)
    assert all(p.is_meta for p in shapes.raw_denoiser.parameters())
    assert shapes.latent_shape() == loaded.latent_shape()
    assert torch.equal(shapes.levels(5).time, loaded.levels(5).time)


def test_libraries_say_nothing_of_casts(tiny_pipelines, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        model_on_meta(tiny_pipelines["sd15"], dtype=torch.bfloat16)
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_a_shard_and_the_units_that_a_pass_gathers():
    denoiser = model_on_meta(PIPELINE).raw_denoiser
    *blocks, (root, rest) = units(denoiser)
    assert root is denoiser
    assert sum(size_of(p) for _, own in [*blocks, (root, rest)] for p in own) == sum(
        map(size_of, denoiser.parameters())
    )
    # Blocks are alike but for the last, which does less.
    sizes = sorted(sum(map(size_of, own)) for _, own in blocks)
    assert gathered_bytes(denoiser) == sum(map(size_of, rest)) + sizes[-1] + sizes[-2]
    assert [Spread(4).share(size) for size in (8, 9, 1)] == [2, 3, 1]
