import copy
import json

import pytest
import torch

from diffalign.runtime import checkpoint


def make(kind=torch.optim.AdamW, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (3, 5, 2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02, "betas": (0.8, 0.95)}]
    return parameters, kind(groups, lr=0.01, **options)


def advance(parameters, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters[: None if step % 2 else 2]:  # The last one lags behind.
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.3}, {"foreach": False}])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, dtype, options):
    parameters, optimizer = make(dtype=dtype, **options)
    advance(parameters, optimizer, range(3))
    tensors, values = checkpoint.flatten_optimizer(optimizer)
    path = checkpoint.save(tmp_path, 3, {"optimizer": tensors}, {"optimizer": values}, keep=None)
    again, other = make(dtype=dtype, **options)
    for old, new in zip(parameters, again, strict=True):
        new.data.copy_(old.data)
    stored, state = checkpoint.load(path)
    checkpoint.restore_optimizer(other, stored["optimizer"], state["optimizer"])
    assert [type(group["betas"]) for group in other.param_groups] == [tuple, tuple]
    before = copy.deepcopy(stored["optimizer"])
    for pair in ((parameters, optimizer), (again, other)):
        advance(*pair, range(3, 5))
    assert all(torch.equal(old, new) for old, new in zip(parameters, again, strict=True))
    one, two = optimizer.state_dict(), other.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    for index, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["state"][index][name])
            assert value.dtype == two["state"][index][name].dtype
    assert all(torch.equal(before[name], stored["optimizer"][name]) for name in before)


def test_float32_moments_of_bfloat16_weights_keep_their_bits(tmp_path):
    parameters, optimizer = make(dtype=torch.bfloat16)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": torch.tensor(16777216.0), "exp_avg": torch.randn(parameter.shape)}
    tensors, values = checkpoint.flatten_optimizer(optimizer)
    other_parameters, other = make(dtype=torch.bfloat16)
    checkpoint.restore_optimizer(other, tensors, values)
    for old, new in zip(parameters, other_parameters, strict=True):
        assert other.state[new]["exp_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[old]["exp_avg"], other.state[new]["exp_avg"])


def test_a_fresh_optimizer_and_a_momentum_of_none_survive(tmp_path):
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.RMSprop, {"momentum": 0.0})):
        optimizer = kind([torch.nn.Parameter(torch.zeros(2))], lr=0.5, **options)
        tensors, values = checkpoint.flatten_optimizer(optimizer)
        other = kind([torch.nn.Parameter(torch.zeros(2))], lr=0.1, **options)
        checkpoint.restore_optimizer(other, tensors, json.loads(json.dumps(values)))
        assert other.param_groups[0]["lr"] == 0.5


def test_an_optimizer_of_other_parameters_is_refused():
    tensors, values = checkpoint.flatten_optimizer(make()[1])
    with pytest.raises(ValueError, match="other parameters: resume with"):
        checkpoint.restore_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]), tensors, values)
