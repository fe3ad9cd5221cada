"""The strict device itself: what it computes and what it refuses."""

import pytest
import torch

from tests.device import strict


def test_it_computes_what_the_cpu_does():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)

    def call(device):
        inputs = [t.detach().to(device).requires_grad_() for t in (x, weight)]
        torch.conv2d(*inputs).square().mean().backward()
        return [t.grad.cpu() for t in inputs]

    for found, expected in zip(call("strict"), call("cpu"), strict=True):
        torch.testing.assert_close(found, expected)


MIXTURES = {
    "sum": lambda a, b: a + b,
    "product": lambda a, b: a @ b,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack of numbers": lambda a, b: torch.stack([a.sum(), b.sum()]),
    "into a number of the CPU": lambda a, b: b.sum().add_(a.sum()),
    "an index of the device in a CPU tensor": lambda a, b: b[a[0].long()],
    "index_select": lambda a, b: a.index_select(0, torch.tensor([0])),
    "where": lambda a, b: torch.where(b > 0, a, a),
    "convolution": lambda a, b: torch.conv2d(a[None, None], b[None, None]),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixed_devices_are_refused(name):
    with pytest.raises(RuntimeError, match="same device"):
        MIXTURES[name](torch.zeros(4, 4, device="strict"), torch.zeros(4, 4))


def test_what_cuda_allows_is_allowed():
    a = torch.arange(6.0, device="strict").reshape(3, 2)
    assert (a * torch.tensor(2.0, dtype=torch.float64)).device.type == "strict"
    assert a[torch.tensor([2, 0])].tolist() == [[4, 5], [0, 1]]
    a[torch.tensor([1])] = torch.tensor(7.0)
    assert a.tolist() == [[0, 1], [7, 7], [4, 5]]


def test_without_float64_none_can_be_made(both_precisions):
    makers = [lambda: torch.zeros(2, dtype=torch.float64, device="strict"), lambda: torch.zeros(2).strict().double()]
    for make in makers:
        if both_precisions:
            assert make().dtype == torch.float64
        else:
            with pytest.raises(TypeError, match="no float64"):
                make()


def test_it_is_the_accelerator():
    assert torch.accelerator.current_accelerator().type == strict.NAME
