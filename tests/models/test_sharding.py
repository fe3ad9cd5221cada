"""Every family in shards says and learns what it does whole; ``tests/trainers/test_shards`` has several processes."""

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffalign import LoraConfig
from diffalign.fsdp import FSDPConfig, free, full_tensor, is_sharded, local_tensor, shard_like
from diffalign.models import load_model
from diffalign.models.weights import POLICY, REFERENCE
from tests.models.families import FAMILIES, LORA, noise_of


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trained(folder, name, shards, dtype=torch.float32):
    """A model, what it says, and the gradients of its LoRA."""
    model = load_model(folder, dtype=dtype, **FAMILIES[name].options)
    model.train(LoraConfig(rank=2), shards=shards)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            local_tensor(parameter).add_(0.1)
    x, conditioning, level = noise_of(model, 2), model.encode(["a red circle", "two stars"]), model.levels(5)[1]
    found = {}
    for weights in (REFERENCE, POLICY):  # adapters are off at the first call
        with model.using(weights), torch.no_grad():
            found[weights] = model.predict(x, level, conditioning)
    model.predict(x, level, conditioning).square().mean().backward()
    return model, found, [full_tensor(p.grad) for p in model.weights.trainable]


def near(one, two):
    """But for the order in which the parts of a gradient are added up."""
    return (one - two).norm() <= 1e-5 * two.norm()


@pytest.mark.parametrize("name", LORA)
def test_a_sharded_family_gives_the_outputs_of_the_full_one(family_pipelines, tmp_path, name):
    folder = family_pipelines[name]
    model, said, gradients = trained(folder, name, None)
    other, again, others = trained(folder, name, FSDPConfig(torch.device("cpu"), keep=True))
    denoiser = other.raw_denoiser
    assert all(isinstance(p, DTensor) for p in denoiser.parameters())
    blocks = [part for part in denoiser.modules() if isinstance(part, FSDPModule) and part is not denoiser]
    assert len(blocks) > 1
    assert all(torch.equal(said[weights], again[weights]) for weights in said)
    assert not torch.equal(said[POLICY], said[REFERENCE])
    assert all(near(one, two) for one, two in zip(gradients, others, strict=True))
    files = [load_file(m.saver(POLICY)(tmp_path / str(is_sharded(m.raw_denoiser)))) for m in (model, other)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0] | files[1])


def test_a_base_in_half_precision_carries_a_lora_in_full(family_pipelines):
    shards = FSDPConfig(torch.device("cpu"))
    (_, said, gradients), (model, again, others) = (
        trained(family_pipelines["sd3"], "sd3", where, torch.bfloat16) for where in (None, shards)
    )
    assert {p.dtype for p in model.raw_denoiser.parameters()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(said[weights], again[weights]) for weights in said)
    assert all(near(one, two) for one, two in zip(gradients, others, strict=True))


def test_gathered_weights_are_freed_when_weights_change(family_pipelines):
    model = load_model(family_pipelines["sd3"], **FAMILIES["sd3"].options)
    model.train(LoraConfig(rank=0), keep_reference=True, shards=FSDPConfig(torch.device("cpu"), keep=True))
    x, conditioning, level = noise_of(model, 1), model.encode(["a red circle"]), model.levels(5)[1]
    with torch.no_grad():
        base = model.predict(x, level, conditioning)
        for parameter in model.weights.trainable:
            local_tensor(parameter).mul_(1.1)
    policy = model.predict(x, level, conditioning)  # whose weights stay for a backward pass
    with model.using(REFERENCE), torch.no_grad():
        assert torch.equal(model.predict(x, level, conditioning), base)
    with torch.no_grad():
        assert torch.equal(model.predict(x, level, conditioning), policy)
    policy.sum().backward()
    free(model.raw_denoiser)
    assert all(isinstance(p.grad, DTensor) for p in model.weights.trainable if p.grad is not None)


def test_a_full_tensor_is_sharded_as_another_and_gathered(family_pipelines):
    mesh = distributed.init_device_mesh("cpu", (1,))
    tensor = torch.arange(12.0).reshape(4, 3)
    other = distributed.tensor.distribute_tensor(torch.zeros(4, 3), mesh, [distributed.tensor.Shard(0)])
    spread = shard_like(tensor, other)
    assert (type(spread), spread.placements) == (DTensor, other.placements)
    assert torch.equal(full_tensor(spread), tensor)
    assert full_tensor(spread, keep=False) is spread
    assert full_tensor(tensor) is tensor
    assert shard_like(tensor, tensor + 1) is tensor
