"""Rollouts: what may not depend on how they are cut into micro-batches."""

import pytest
import torch

from diffalign.diffusion.plan import Plan, Row
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rng import KeyedRNG
from diffalign.rollout import generate as generation
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.structures import Guidance
from tests.rollout.decoded import rollouts

GROUP, SAMPLE = torch.arange(6) // 3, torch.arange(6) % 3
SDE, ODE, MULTI = Row("flow_sde", 0.7, True), Row("ode", 0.0, False), Row("dpmpp_2m", 0.0, False)


def roll(model, prompts, size, plan=(SDE, SDE, ODE, ODE), shared=False, iteration=0, guidance=None):
    levels = model.levels(len(plan))
    route = SamplingPlan(Plan(plan), levels, guidance)
    buffer = RolloutBuffer.allocate(route.plan, GROUP, SAMPLE, list(prompts), model.latent_shape(), means=True)
    addresses = NoiseKeys(KeyedRNG(0), "rollout", iteration, GROUP, SAMPLE, shared)
    conditioning = model.encode([p.text for p in prompts])
    images = [images for _, images in rollouts(model, route, conditioning, addresses, buffer, size)]
    return buffer, torch.cat(images), route, conditioning


@pytest.mark.parametrize("size", [1, 4, 5])
def test_micro_batch_size_changes_nothing(frozen, train_prompts, size):
    whole, images, *_ = roll(frozen, train_prompts[:2], 6)
    parts, others, *_ = roll(frozen, train_prompts[:2], size)
    start = whole.step == 0
    assert torch.equal(whole.x[start], parts.x[start]), "the noise is the same to the bit"
    assert (whole.x - parts.x).abs().max() < 1e-5
    # A lone sample goes through other matrix kernels; at a few edges the decoder makes five times its rounding of it.
    difference = (images - others).abs()
    assert difference.max() < (2e-5 if size == 1 else 1e-5)
    assert (difference > 1e-5).float().mean() < 1e-3
    assert (whole.log_prob - parts.log_prob)[whole.trained].abs().max() < 1e-5


def test_decoding_in_half_precision_moves_no_pixel_far(frozen):
    latents = KeyedRNG(0).normal_batch(frozen.latent_shape(), "test", [(i,) for i in range(8)])
    exact, rough = generation.decode(frozen, latents), generation.decode(frozen, latents, torch.bfloat16)
    assert rough.dtype == exact.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05
    assert (rough - exact).abs().mean() < 0.005


@pytest.mark.parametrize("shared", [False, True])
def test_a_group_shares_its_start_noise_when_asked(frozen, train_prompts, shared):
    buffer, *_ = roll(frozen, train_prompts[:2], 6, shared=shared)
    first, second, *_, other = buffer.x[buffer.step == 0]
    assert torch.equal(first, second) == shared
    assert not torch.equal(first, other)
    step_one = buffer.x[buffer.step == 1]
    assert not torch.equal(step_one[0], step_one[1]), "the noise of a step is each sample's own"


@pytest.mark.parametrize("first", [MULTI, ODE])
def test_steps_that_a_group_shares_are_made_once(frozen, train_prompts, monkeypatch, first):
    """Until the first noise, samples of a group with the same start are one sample."""
    plan = (first, first, SDE, SDE, ODE)
    rows = []
    evaluate = type(frozen).evaluate

    def counted(self, x, time, conditioning):
        rows.append(len(x))
        return evaluate(self, x, time, conditioning)

    monkeypatch.setattr(type(frozen), "evaluate", counted)
    once, images, *_ = roll(frozen, train_prompts[:2], 6, plan=plan, shared=True)
    assert rows == [2, 2, 6, 6, 6]
    monkeypatch.setattr(generation, "shared_steps", lambda plan: 0)
    each, others, *_ = roll(frozen, train_prompts[:2], 6, plan=plan, shared=True)
    assert (once.x - each.x).abs().max() < 1e-5
    assert (once.log_prob - each.log_prob)[once.trained].abs().max() < 1e-5
    assert (images - others).abs().max() < 1e-5


@pytest.mark.parametrize(("side", "sizes"), [(32, [32, 8]), (512, [4] * 10), (1024, [1] * 40)])
def test_large_images_are_decoded_few_at_a_time(side, sizes):
    seen = []

    class Model:
        default_resolution, device = (side, side), torch.device("cpu")

        def decode(self, latents):
            seen.append(len(latents))
            return latents

    assert len(generation.decode(Model(), torch.zeros(40, 1))) == 40
    assert seen == sizes


def test_iterations_differ(frozen, train_prompts):
    first, *_ = roll(frozen, train_prompts[:2], 6)
    second, *_ = roll(frozen, train_prompts[:2], 6, iteration=1)
    assert not torch.equal(first.x, second.x)


@pytest.mark.parametrize("guided", [False, True])
def test_replay_is_exact_at_equal_shapes(frozen, train_prompts, guided):
    guidance = Guidance(3.0, frozen.encode([""])) if guided else None
    buffer, _, route, conditioning = roll(frozen, train_prompts[:2], 6, guidance=guidance)
    for step in route.plan.trained_steps:
        nodes = buffer.nodes(slice(None), step + 1)
        x, x_next = buffer.x[buffer.parent[nodes]], buffer.x[nodes]
        with torch.no_grad():
            result = route.replay(frozen, step, x, conditioning[buffer.group[nodes]], x_next)
        assert torch.equal(result.log_prob, buffer.log_prob[nodes])
        assert torch.equal(result.mean, buffer.mean[buffer.trained_rank(nodes)])


def test_a_second_order_solver_starts_afresh_after_noise(frozen, train_prompts):
    """After an SDE row its first step is the Euler step, so a single one changes nothing."""
    plain, images, *_ = roll(frozen, train_prompts[:2], 6, plan=(SDE, ODE, ODE))
    multi, same, *_ = roll(frozen, train_prompts[:2], 6, plan=(SDE, MULTI, ODE))
    assert torch.equal(plain.x, multi.x)
    assert torch.equal(images, same)
    _, different, *_ = roll(frozen, train_prompts[:2], 6, plan=(SDE, MULTI, MULTI, ODE))
    _, euler, *_ = roll(frozen, train_prompts[:2], 6, plan=(SDE, ODE, ODE, ODE))
    assert not torch.equal(different, euler)


def test_rollouts_leave_the_global_generator_alone(frozen, train_prompts):
    before = torch.random.get_rng_state()
    roll(frozen, train_prompts[:2], 6)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_generate_is_a_plain_ode(frozen, train_prompts):
    levels = frozen.levels(4)
    addresses = NoiseKeys(KeyedRNG(0), "evaluation", 0, GROUP, SAMPLE)
    conditioning = frozen.encode([p.text for p in train_prompts[:2]])
    plan = SamplingPlan(ode_plan(4), levels)
    runs = [torch.cat([i for _, i in generate(frozen, plan, conditioning, GROUP, addresses, size)]) for size in (6, 2)]
    assert (runs[0] - runs[1]).abs().max() < 1e-5


def test_each_distinct_prompt_is_encoded_once(frozen, monkeypatch):
    asked = []
    encode = type(frozen).encode
    monkeypatch.setattr(type(frozen), "encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    encoded = PromptEmbeddingCache(frozen)
    first = encoded(["a red circle", "a blue square", "a red circle"])
    assert torch.equal(first.tensors["embeds"][0], first.tensors["embeds"][2])
    encoded(["a blue square", "a circle"])
    assert asked == ["a red circle", "a blue square", "a circle"]


def test_text_encoders_are_known_by_the_scales_of_adapters_on_them(frozen, monkeypatch):
    layer, found = next(frozen.pipeline.text_encoder.children()), [PromptEmbeddingCache(frozen).identity]
    for scale in (1.0, 0.5):
        monkeypatch.setattr(layer, "scaling", {"default": scale}, raising=False)  # as peft calls it
        found.append(PromptEmbeddingCache(frozen).identity)
    assert len({*found}) == 3


def test_the_memory_of_encoded_prompts_is_bounded(frozen):
    encoded = PromptEmbeddingCache(frozen, limit=1)
    encoded(["a red circle", "a blue square"])
    assert [*encoded._rows] == ["a blue square"]
    encoded.prepare(["a red circle", "a circle"])
    encoded(["a circle"])
    assert [*encoded._rows] == ["a red circle", "a circle"]  # a phase is to find what it prepared
