import pytest
import torch

from diffalign.diffusion.parameterization import PARAMETERIZATIONS, add_noise, inverse, target, to_noise, to_x0
from diffalign.structures import Level

FLOW = Level(*torch.tensor([[0.3], [0.7], [700.0]], dtype=torch.float64))[0]
VP = Level(*torch.tensor([[0.6], [0.8], [500.0]], dtype=torch.float64))[0]
ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
PURE_NOISE = Level(ZERO, ONE, 1000 * ONE)


def samples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("level", [FLOW, VP])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_x0_and_noise_come_back(kind, level, dtype, tolerance):
    x0, noise = samples(dtype)
    x, output = add_noise(x0, noise, level), target(kind, x0, noise, level)
    assert x.dtype == output.dtype == dtype
    torch.testing.assert_close(to_x0(kind, x, output, level), x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(to_noise(kind, x, output, level), noise, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("epsilon", lambda x0, noise, level: noise),
        ("v", lambda x0, noise, level: level.alpha * noise - level.sigma * x0),
        ("flow", lambda x0, noise, level: noise - x0),
    ],
)
def test_targets_are_the_published_ones(kind, published):
    x0, noise = samples()
    torch.testing.assert_close(target(kind, x0, noise, VP), published(x0, noise, VP), rtol=0, atol=0)


def test_published_inverses():
    x, output = samples()
    torch.testing.assert_close(to_x0("flow", x, output, FLOW), x - FLOW.sigma * output)
    torch.testing.assert_close(to_noise("flow", x, output, FLOW), x + (1 - FLOW.sigma) * output)
    torch.testing.assert_close(to_x0("v", x, output, VP), VP.alpha * x - VP.sigma * output)
    torch.testing.assert_close(to_noise("v", x, output, VP), VP.sigma * x + VP.alpha * output)
    torch.testing.assert_close(to_x0("epsilon", x, output, VP), (x - VP.sigma * output) / VP.alpha)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_level_per_sample_equals_scalar_levels_bit_for_bit(kind, dtype):
    x, output = samples(dtype)
    batch = Level(*torch.tensor([[0.3, 0.61, 0.97], [0.7, 0.39, 0.03], [1, 2, 3]], dtype=torch.float64))
    for function in (to_x0, to_noise, target):
        together = function(kind, x, output, batch)
        apart = [function(kind, x[i : i + 1], output[i : i + 1], batch[i]) for i in range(3)]
        assert torch.equal(together, torch.cat(apart))
        assert together.dtype == torch.promote_types(dtype, torch.float32)


def test_half_precision_inputs_are_widened_before_they_meet_a_coefficient():
    x0, noise = samples(torch.bfloat16)
    exact = add_noise(x0.double(), noise.double(), FLOW)
    assert (add_noise(x0, noise, FLOW) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_pure_noise_is_its_own_noise(kind):
    x, output = samples()
    torch.testing.assert_close(to_noise(kind, x, output, PURE_NOISE), x, rtol=0, atol=0)
    assert to_x0(kind, x, output, PURE_NOISE).isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="does not determine x0"):
        inverse("epsilon", PURE_NOISE)
    with pytest.raises(ValueError, match="known: epsilon, v, flow"):
        inverse("eps", VP)
