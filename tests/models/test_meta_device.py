"""A pipeline without weights has the shapes and schedules of the loaded one."""

import pytest
import torch

from diffalign.fsdp import units
from diffalign.models import LoraConfig, load_model
from diffalign.models.meta_device import model_on_meta
from diffalign.models.offload import TEXT_ENCODERS, VAE, part_of
from diffalign.models.weight_memory import DRAWING, ENCODING, TRAINING, Spread, memory_needs, size_of
from tests.conftest import PIPELINE


@pytest.mark.parametrize("name", ["shapes", "sd15", "sdxl"])
def test_a_model_on_meta_needs_the_memory_of_the_loaded_one(name, tiny_pipelines):
    path = PIPELINE if name == "shapes" else tiny_pipelines[name]
    options = {"max_sequence_length": 16} if name == "shapes" else {}
    shapes, loaded = (load(path, **options) for load in (model_on_meta, load_model))
    for model in (shapes, loaded):
        model.train(LoraConfig(rank=4))
    assert memory_needs(shapes, 3, copies=1) == memory_needs(loaded, 3, copies=1)
    assert all(p.is_meta for p in shapes.raw_denoiser.parameters())
    assert shapes.latent_shape() == loaded.latent_shape()
    assert torch.equal(shapes.levels(5).time, loaded.levels(5).time)


@pytest.fixture(scope="module")
def lora():
    model = model_on_meta(PIPELINE)
    model.train(LoraConfig(rank=4))
    return model


def weight_of(*networks):
    return sum(size_of(t) for network in networks for t in [*network.parameters(), *network.buffers()])


def test_parts_that_leave_count_where_they_are(lora):
    pipeline, staying = lora.pipeline, memory_needs(lora, 0)
    text = weight_of(*(part_of(pipeline, TEXT_ENCODERS).values()))
    vae, gradients = weight_of(pipeline.vae), staying.gradients
    idle = staying.total - gradients
    assert staying.phases() == {ENCODING: idle, DRAWING: idle, TRAINING: staying.total}
    needs = memory_needs(lora, 0, offload=(TEXT_ENCODERS, VAE))
    assert needs.total == staying.total
    assert needs.phases() == {ENCODING: idle - vae, DRAWING: idle - text, TRAINING: staying.total - text - vae}
    assert needs.phases([VAE])[TRAINING] == staying.total - text
    assert memory_needs(lora, 0, offload=(VAE,)).phases()[ENCODING] == idle - vae


@pytest.mark.parametrize("keep", [False, True])
def test_memory_counts_shards_and_the_gathered_unit(lora, keep):
    whole, shared = memory_needs(lora, 0), memory_needs(lora, 0, spread=Spread(4, keep))
    denoiser = lora.raw_denoiser
    weights = sum(map(size_of, denoiser.parameters()))
    per_process = [-(-size_of(p) // 4) for p in denoiser.parameters()]
    others = whole.total - weights - whole.gradients - whole.moments
    assert shared.total - shared.gradients - shared.moments == others + sum(per_process)
    assert shared.gradients == pytest.approx(whole.gradients / 4, abs=len(per_process))
    *blocks, (root, rest) = units(denoiser)
    assert root is denoiser
    assert sum(size_of(p) for _, own in [*blocks, (root, rest)] for p in own) == weights
    # Blocks are alike but for the last, which does less.
    sizes = sorted(sum(map(size_of, own)) for _, own in blocks)
    assert shared.gathered == sum(map(size_of, rest)) + sizes[-1] + sizes[-2]
    assert shared.gathered_to_train == (weights if keep else shared.gathered)
    phases = shared.phases()
    assert phases[TRAINING] - phases[DRAWING] == shared.gathered_to_train - shared.gathered + shared.gradients
