"""Every stochastic solver on the published schedule of every family: sound steps, or a refusal that says what to do."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from diffalign.diffusion.plan import PRESETS, PUBLISHED_NOISE_LEVEL, Plan, PlanConfig, Row, make_plan, possible_plans
from diffalign.diffusion.schedule import flow_levels
from diffalign.diffusion.steps import FLOW_ONLY, step, transition
from diffalign.models.cogview4 import CogView4Model
from diffalign.models.flow import FlowModel
from diffalign.models.flux import FluxModel
from diffalign.models.flux2 import Flux2Model
from diffalign.models.lumina2 import Lumina2Model
from diffalign.models.pixart_sigma import PixArtSigmaModel
from diffalign.models.qwen_image import QwenImageModel
from diffalign.models.sana import SanaModel
from diffalign.models.sd import SDModel
from diffalign.models.sd3 import SD3Model
from diffalign.models.z_image import ZImageModel
from tests.models.published_configs import SD15_SCHEDULER, SD21_SCHEDULER, SD35_SCHEDULER, SDXL_SCHEDULER, settings
from tests.models.published_flow_configs import (
    FLUX_SCHEDULER,
    QWEN_SCHEDULER,
    SANA_SCHEDULER,
    SCHEDULERS,
    SCHNELL_SCHEDULER,
    Z_IMAGE_SCHEDULER,
    flow_scheduler,
)

FAMILIES = {
    "sd15": (SDModel, partial(PNDMScheduler.from_config, SD15_SCHEDULER)),
    "sd21": (SDModel, partial(PNDMScheduler.from_config, SD21_SCHEDULER)),
    "sdxl": (SDModel, partial(EulerDiscreteScheduler.from_config, SDXL_SCHEDULER)),
    "pixart_sigma": (
        PixArtSigmaModel,
        partial(
            DPMSolverMultistepScheduler.from_config, settings("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "scheduler")
        ),
    ),
    "sd35": (SD3Model, partial(flow_scheduler, SD35_SCHEDULER)),
    "flux_dev": (FluxModel, partial(flow_scheduler, FLUX_SCHEDULER)),
    "flux_schnell": (FluxModel, partial(flow_scheduler, SCHNELL_SCHEDULER)),
    "qwen_image": (QwenImageModel, partial(flow_scheduler, QWEN_SCHEDULER)),
    "sana": (SanaModel, partial(DPMSolverMultistepScheduler.from_config, SANA_SCHEDULER)),
    "z_image": (ZImageModel, partial(flow_scheduler, Z_IMAGE_SCHEDULER)),
    "lumina2": (Lumina2Model, partial(flow_scheduler, SCHEDULERS["lumina2"])),
    "cogview4": (CogView4Model, partial(flow_scheduler, SCHEDULERS["cogview4"])),
    "flux2_dev": (Flux2Model, partial(flow_scheduler, SCHEDULERS["flux2_dev"])),
}
STEPS = range(4, 51)


@cache
def levels_of(family, num_steps, schedule="pipeline"):
    """What the family's model visits at 1024 pixels, by its own code and without its weights."""
    kind, scheduler = FAMILIES[family]
    model = object.__new__(type("Bare", (kind,), {"latent_shape": lambda *_: (16, 128, 128), "patch_size": 2}))
    model.pipeline = SimpleNamespace(scheduler=scheduler())
    return kind.levels(model, num_steps, schedule)


def solvers(family):
    flow = issubclass(FAMILIES[family][0], FlowModel)
    return [name for name in PUBLISHED_NOISE_LEVEL if flow or name not in FLOW_ONLY]


def all_but_last(solver, num_steps, noise_level):
    return Plan((Row(solver, noise_level, True),) * (num_steps - 1) + (Row("ode", 0.0, False),))


def refused(plan, levels):
    try:
        plan.validate(levels)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("schedule", ["pipeline", "uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_sound_or_refused_in_words(family, schedule):
    accepted = 0
    for num_steps in STEPS:
        levels = levels_of(family, num_steps, schedule)
        for solver in solvers(family):
            noise_level = PUBLISHED_NOISE_LEVEL[solver]
            moves = transition(solver, levels[:-2], levels[1:-1], noise_level)
            if refusal := refused(all_but_last(solver, num_steps, noise_level), levels):
                assert refusal.startswith("step ")
                assert "use " in refusal
                assert len(refusal) < 500
                continue
            accepted += 1
            assert moves.m_noise.isfinite().all()
            assert (moves.std > 0).all()
            # Of a latent of variance 1, no step makes one that it does not free of noise again.
            assert (moves.std <= 1.2).all()
            left = torch.hypot(moves.m_noise, moves.std)
            assert ((moves.m_noise >= 0) | (left <= 1.2 * levels.sigma[:-2])).all()
    assert accepted > len(STEPS)


@pytest.mark.parametrize(("family", "num_steps"), [("sd35", 10), ("flux_dev", 6), ("flux_dev", 10), ("sana", 10)])
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"ode"}))
def test_published_settings_are_accepted(family, num_steps, preset):
    for plan in possible_plans(PlanConfig(preset, num_steps), trees=True):
        plan.validate(levels_of(family, num_steps))
    # FLUX is published with more noise.
    possible_plans(PlanConfig("flow_grpo_fast", 6, noise_level=0.9))[-1].validate(levels_of("flux_dev", 6))


def test_a_schedule_that_starts_just_below_one():
    """SANA's scheduler starts at .99967, where sigma under the root drew 7.2 and kept -25."""
    levels = levels_of("sana", 10)
    first = transition("flow_sde", levels[0], levels[1], 0.7)
    assert float(levels.sigma[0]) == pytest.approx(0.99967, abs=1e-5)
    assert float(first.std) == pytest.approx(0.6966, abs=1e-4)
    assert float(first.m_noise) == pytest.approx(0.7212, abs=1e-4)


@pytest.mark.parametrize("num_steps", [4, 10, 50])
def test_latents_of_sana_stay_of_size_one(num_steps):
    """Exact denoiser of data that are 0: every state is noise of the level's sigma, and more only by Euler's error."""
    levels, generator = levels_of("sana", num_steps), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4, 4, 16, 16, generator=generator)  # noqa: E731
    plan = make_plan(PlanConfig("flow_grpo", num_steps), 0, 0)
    x = draw()
    for index, row in enumerate(plan.rows):
        level = levels[index]
        x = step(row.solver, x, x / level.sigma, level, levels[index + 1], parameterization="flow",
                 noise_level=row.noise_level, noise=draw()).x_next  # fmt: skip
        assert x.std() < 1.6


@pytest.mark.parametrize("first", [1.0, 0.9999, 0.9995, 0.99901])
@pytest.mark.parametrize("second", [0.9985, 0.99, 0.9])
@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
def test_the_first_std_is_the_noise_level_wherever_a_schedule_starts(first, second, a):
    levels = flow_levels([first, second, 0.5, 0.0])
    assert float(transition("flow_sde", levels[0], levels[1], a).std) <= a * (1 + 1e-12)
    expected = a * (first * (first - second) / (1 - second)) ** 0.5
    assert float(transition("flow_sde", levels[0], levels[1], a).std) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("row", "sigmas", "message"),
    [
        # A start between pure noise and where sigma under the root is safe.
        (Row("flow_sde", 0.7, True), [0.9985, 0.9, 0.5, 0.0], "keeps -15.* a noise_level of at most 0.16"),
        (Row("flow_sde", 0.7, False), [0.9985, 0.9, 0.5, 0.0], "keeps -15"),
        (Row("flow_sde", 5.0, True), [1.0, 0.9, 0.5, 0.0], "keeps -11.6 of the noise from sigma 1 to 0.9"),
        (Row("dance_sde", 3.0, True), [1.0, 0.5, 0.2, 0.0], "a noise_level of at most 1.41"),
        # To a level without noise: what it draws would stay in the image.
        (Row("dance_sde", 0.3, True), [0.2, 0.0], "'ode' for this step"),
        (Row("flow_sde", 0.7, False), [0.2, 0.0], "'ode' for this step"),
        (Row("cps", 0.8, True), [0.2, 0.0], "draws no noise from sigma 0.2 to 0"),
        (Row("ddim", 1.0, True), [0.2, 0.0], "draws no noise from sigma 0.2 to 0"),
        # To one where float32 holds no density.
        (Row("cps", 0.8, True), [0.2, 1e-7, 0.0], "draws no noise from sigma 0.2 to 1e-07"),
        (Row("ddim", 1.0, True), [0.2, 1e-7, 0.0], "draws no noise from sigma 0.2 to 1e-07"),
    ],
)
def test_rows_without_a_sound_step_are_refused(row, sigmas, message):
    still = Row("ode", 0.0, False)
    before = (Row("cps", 0.8, True),) if sigmas[0] < 1 else ()
    levels = flow_levels([1.0, *sigmas] if before else sigmas)
    with pytest.raises(ValueError, match=message):
        Plan((*before, row, *(still,) * (len(sigmas) - 2))).validate(levels)


def test_the_noise_level_that_a_refusal_names_is_accepted():
    levels = flow_levels([0.9985, 0.9, 0.5, 0.0])
    rest = (Row("cps", 0.8, True), Row("ode", 0.0, False))
    Plan((Row("flow_sde", 0.16, True), *rest)).validate(levels)
    assert transition("flow_sde", levels[0], levels[1], 0.17).m_noise < 0


def test_windows_that_come_later_are_checked_at_the_start():
    """Of SD3's four steps the last but one keeps -.36 of the noise; a sliding window reaches it after 25 iterations."""
    levels, config = levels_of("sd35", 4), PlanConfig("mix_grpo", 4, window_size=1)
    assert [refused(plan, levels) is None for plan in possible_plans(config)] == [True, True, False]
    assert "step 2 of the plan ('flow_sde'): it keeps -0.356" in refused(possible_plans(config)[-1], levels)
    for iteration in range(0, 200, 25):
        assert make_plan(config, iteration, 0) in possible_plans(config)
