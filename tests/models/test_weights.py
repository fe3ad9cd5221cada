"""Named weight sets on a plain module and on a LoRA."""

import pytest
import torch
from torch import nn

from diffalign.models import LoraConfig
from diffalign.models.weights import WeightSets

TEXT = ["a red circle"]


def output(model):
    x = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(x, model.levels(4)[1], model.encode(TEXT))


def disturb(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_switching_copies_nothing_and_restores():
    module = nn.Linear(3, 2)
    sets = WeightSets(module, has_adapter=False)
    sets.keep_copy("reference")
    with torch.no_grad():
        module.weight.mul_(2)
    tuned, place = module.weight.clone(), module.weight.data_ptr()
    with sets.using("reference"):
        assert torch.equal(module.weight * 2, tuned)
    assert torch.equal(module.weight, tuned)
    assert module.weight.data_ptr() == place


def test_weights_return_after_an_error():
    module = nn.Linear(3, 2)
    sets = WeightSets(module, has_adapter=False)
    sets.add("zero", [torch.zeros_like(p) for p in module.parameters()])
    before = module.weight.clone()
    with pytest.raises(RuntimeError, match="inside"), sets.using("zero"):
        raise RuntimeError("inside")
    assert torch.equal(module.weight, before)


def test_unknown_and_ill_fitting_sets_are_refused():
    sets = WeightSets(nn.Linear(3, 2), has_adapter=False)
    with pytest.raises(ValueError, match="unknown weight set 'ema'; known: policy"), sets.using("ema"):
        pass
    with pytest.raises(ValueError, match="does not match the trainable parameters"):
        sets.add("ema", [torch.zeros(1)])
    with pytest.raises(ValueError, match="choose another name"):
        sets.add("policy", [])


@pytest.mark.parametrize("rank", [4, 0])
def test_reference_is_the_base_bit_for_bit(frozen, model, rank):
    base = output(frozen)
    model.train(LoraConfig(rank=rank), keep_reference=True)
    assert torch.equal(output(model), base), "training must start at the base"
    disturb(model)
    tuned = output(model)
    assert not torch.equal(tuned, base)
    trainable = [p.requires_grad for p in model.raw_denoiser.parameters()]
    with model.using("reference"):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), tuned)
    assert [p.requires_grad for p in model.raw_denoiser.parameters()] == trainable
