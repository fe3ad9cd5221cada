"""Caches of diffusers in rollouts: what is computed is counted, each sampling starts empty, and nothing stays on."""

import pytest
import torch

from diffalign.models import load_model
from diffalign.models.sampling_cache import cached, first_block, taylorseer
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Guidance
from tests.models.families import FAMILIES, SHORT, noise_of

STEPS, TEXTS = 6, ["a red circle", "a blue square"]
CACHED = ("flux_dev", "qwen_image")


@pytest.fixture(scope="module", params=CACHED)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].build().save_pretrained(folder)
    return load_model(folder, **SHORT)


def drawn(model, scale=1.0, seed=0):
    guidance = Guidance(scale, model.unconditional()) if scale != 1 else None
    plan = SamplingPlan(ode_plan(STEPS), model.levels(STEPS), guidance)
    return sample(model, plan, model.encode(TEXTS), noise_of(model, len(TEXTS)) + seed)


def share(computed):
    return pytest.approx(computed / STEPS)


@pytest.mark.parametrize(
    ("cache", "computed"),
    [
        (first_block(1e-9), STEPS),  # no change is this small
        (first_block(1e9), 1),
        (taylorseer(1, 2, 1), STEPS),
        (taylorseer(2, 2, 1), 4),  # two at the start, then every second one
        (taylorseer(100, 2, 1), 3),
    ],
)
def test_what_is_computed_is_counted_and_what_is_not_differs(model, cache, computed):
    exact = drawn(model)
    with cached(model.raw_denoiser, cache) as count:
        found = drawn(model)
    assert count.calls == STEPS * len(TEXTS)
    assert count.computed_share == share(computed)
    assert torch.equal(found, exact) == (computed == STEPS)
    assert (found - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("cache", [first_block(1e9), taylorseer(2, 2, 1)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_each_sampling_begins_anew_and_nothing_stays_on(model, cache, scale):
    exact = drawn(model, scale)
    with cached(model.raw_denoiser, cache) as count:
        first = drawn(model, scale)
        drawn(model, scale, seed=1)
        assert torch.equal(drawn(model, scale), first)
    assert count.calls == 3 * STEPS * len(TEXTS) * (1 if scale == 1 else 2)
    assert not torch.equal(first, exact)
    assert torch.equal(drawn(model, scale), exact)
    assert not model.raw_denoiser.is_cache_enabled


def test_an_error_turns_the_cache_off(model):
    with pytest.raises(ZeroDivisionError), cached(model.raw_denoiser, first_block(1.0)):
        _ = 1 / 0
    assert not model.raw_denoiser.is_cache_enabled


def test_a_denoiser_without_caches_is_refused(frozen):
    words = "no caches for SD3Transformer2DModel: set rollout_cache: none"
    with pytest.raises(ValueError, match=words), cached(frozen.raw_denoiser, first_block(1.0)):
        pass
