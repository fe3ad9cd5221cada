"""The SD3 family against diffusers' own pipeline."""

import random

import numpy as np
import pytest
import torch

from diffalign.models import load_model
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.shapes import judge_batch, prompt_set, render, scene_for
from diffalign.structures import Guidance, Level

TEXTS = ["a red circle", "a blue square left of a yellow circle", "three triangles"]


def start_noise(model, count, seed=0):
    return torch.randn(count, *model.latent_shape(), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("schedule", "steps"), [("pipeline", 4), ("pipeline", 28), ("uniform", 5)])
def test_levels_are_the_pipelines_own(frozen, pipeline, schedule, steps):
    levels = frozen.levels(steps, schedule)
    grid = {"sigmas": np.linspace(1, 1 / steps, steps)} if schedule == "uniform" else {"num_inference_steps": steps}
    pipeline.scheduler.set_timesteps(**grid)
    assert torch.equal(levels.sigma.float(), pipeline.scheduler.sigmas)
    assert torch.equal(levels.time[:-1].float(), pipeline.scheduler.timesteps)


def test_levels_of_training_are_unshifted_sigmas(frozen):
    level = frozen.level_at(torch.tensor([250, 999]))
    assert level.sigma.tolist() == [0.25, 0.999]
    assert level.time.tolist() == [250, 999]
    assert level.is_flow


def test_unknown_schedule_is_refused(frozen):
    with pytest.raises(ValueError, match="unknown schedule 'karras'; known: pipeline, uniform"):
        frozen.levels(4, "karras")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("schedule", ["pipeline", "uniform"])
def test_ode_path_is_the_pipelines_output(frozen, pipeline, guidance_scale, schedule):
    noise, steps = start_noise(frozen, len(TEXTS)), 6
    grid = {"sigmas": np.linspace(1, 1 / steps, steps)} if schedule == "uniform" else {"num_inference_steps": steps}
    expected = pipeline(
        TEXTS, latents=noise, guidance_scale=guidance_scale, max_sequence_length=16, output_type="latent", **grid
    ).images
    # Encoded at the batch size that the pipeline uses, because guidance multiplies the last bits.
    guidance = Guidance(guidance_scale, frozen.encode([""] * len(TEXTS))[:1])
    route = SamplingPlan(ode_plan(steps), frozen.levels(steps, schedule), guidance)
    latents = sample(frozen, route, frozen.encode(TEXTS), noise)
    assert (latents - expected).abs().max() < 1e-6 * max(1.0, guidance_scale)
    with torch.no_grad():
        shown = frozen.decode(latents)
    decoded = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor)
    assert (shown - (decoded.sample / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_second_order_solver_comes_closer_to_the_fine_solution(frozen):
    noise, conditioning = start_noise(frozen, len(TEXTS)), frozen.encode(TEXTS)

    def run(solver, steps):
        return sample(
            frozen, SamplingPlan(ode_plan(steps, solver), frozen.levels(steps, "uniform")), conditioning, noise
        )

    fine = run("ode", 128)
    assert (run("dpmpp_2m", 16) - fine).norm() < 0.7 * (run("ode", 16) - fine).norm()


def test_a_level_per_sample_equals_one_level_each(frozen):
    x, conditioning, levels = start_noise(frozen, 3), frozen.encode(TEXTS), frozen.levels(6)
    with torch.no_grad():
        together = frozen.predict(x, Level(levels.alpha[:3], levels.sigma[:3], levels.time[:3]), conditioning)
        alone = [frozen.predict(x[i : i + 1], levels[i], conditioning[i : i + 1]) for i in range(3)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_plain_attention_is_used_and_says_the_same(model):
    allowed = []
    model.raw_denoiser.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.flash_sdp_enabled())
    )
    x, level, conditioning = start_noise(model, 2), model.levels(4)[1], model.encode(["a red circle", "a blue square"])
    with torch.no_grad():
        fused = model.predict(x, level, conditioning)
        model.plain_attention = True
        plain = model.predict(x, level, conditioning)
    assert allowed == [True, False]
    assert (fused - plain).abs().max() < 1e-5


def drawn(count):
    prompts = prompt_set(count, held_out=False, seed=5)
    return render([scene_for(p.metadata, random.Random(i)) for i, p in enumerate(prompts)]), prompts


def test_images_survive_encoding_and_decoding(frozen):
    images, prompts = drawn(30)
    with torch.no_grad():
        restored = torch.cat([frozen.decode(frozen.encode_images(part)) for part in images.split(32)])
    verdicts = judge_batch(restored, [p.metadata for p in prompts])
    assert sum(v.strict for v in verdicts) / len(verdicts) >= 0.98
    assert (restored - images).square().mean() < 10**-3.3


def test_latents_have_unit_scale(frozen):
    with torch.no_grad():
        latents = frozen.encode_images(drawn(8)[0])
    assert abs(latents.mean()) < 0.1
    assert 0.9 < latents.std() < 1.1


def test_decoding_is_differentiable(frozen):
    latents = start_noise(frozen, 1).requires_grad_()
    frozen.decode(latents).mean().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all"])
def test_missing_model_is_named(path):
    with pytest.raises(FileNotFoundError, match="no such folder; give a folder in diffusers' layout"):
        load_model(path)


def test_folder_without_index_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        load_model(tmp_path)


def test_unknown_family_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ValueError, match=r"KandinskyPipeline are not supported; supported: .*StableDiffusion3Pipeline"):
        load_model(tmp_path)
