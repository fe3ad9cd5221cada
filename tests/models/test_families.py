"""Compare every family of ``families.FAMILIES`` with diffusers' pipeline and run it through every trainer."""

import io
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from diffalign import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    ForwardRLConfig,
    ForwardRLTrainer,
    LoraConfig,
    Prompt,
    ReFLConfig,
    ReFLTrainer,
)
from diffalign.commands.evaluate_config import EvaluationConfig, resolve
from diffalign.config import save_yaml
from diffalign.diffusion.plan import Plan, PlanConfig, Row
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.models import load_model, with_tuned_weights
from diffalign.rewards.base import FunctionReward
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Guidance
from tests.conftest import PROMPTS, Lazy
from tests.models.families import FAMILIES, NAMES, images_of, noise_of, packed
from tests.models.plain_diffusers import TEXTS, draw_fresh
from tests.phases import collect

MANY = ["a red circle", "a blue square left of a yellow circle", "three triangles"]


@pytest.fixture(scope="module")
def models(family_pipelines):
    """No test may change them."""
    return Lazy(lambda name: load_model(family_pipelines[name], **FAMILIES[name].options))


@pytest.mark.parametrize("name", FAMILIES)
def test_our_ode_draws_the_pipelines_images(models, plain, name):
    family, model, pipe = FAMILIES[name], models[name], plain(name)
    noise = noise_of(model, len(MANY))
    for scale in (1.0, 3.0) if family.guided else (1.0,):
        call = {**family.call, **(family.guided(scale, len(MANY)) if scale != 1 else {})}
        call |= {"latents": packed(pipe, noise), "num_inference_steps": 5, "output_type": "pt"}
        expected = pipe(prompt=list(MANY), **call).images
        images = images_of(family, model, noise, MANY, 5, scale)
        assert images.std() > 0.01
        assert (images - expected).abs().max() < 1e-5 * scale
        if scale == 1:
            unguided = images
    assert family.guided is None or (images - unguided).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_at_a_height_and_a_width_it_draws_the_pipelines_images(family_pipelines, plain, name):
    family, pipe = FAMILIES[name], plain(name)
    unit = load_model(family_pipelines[name], **family.options).resolution_unit
    height, width = unit, 2 * unit
    model = load_model(family_pipelines[name], **{**family.options, "resolution": (height, width)})
    noise = noise_of(model, 2)
    call = {**family.call, "height": height, "width": width}
    call |= {"latents": packed(pipe, noise), "num_inference_steps": 3, "output_type": "pt"}
    expected = pipe(prompt=MANY[:2], **call).images
    images = images_of(family, model, noise, MANY[:2], 3, 1.0)
    assert images.shape == (2, 3, height, width)
    assert (images - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_level_per_sample_equals_one_level_each(models, name):
    model = models[name]
    x, conditioning, levels = noise_of(model, 3), model.encode(MANY), model.levels(5)
    with torch.no_grad():
        together = model.predict(x, levels[:3], conditioning)
        alone = [model.predict(x[i : i + 1], levels[i], conditioning[i : i + 1]) for i in range(3)]
    assert together.dtype == torch.float32
    assert (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_encoded_alike_alone_and_in_company(models, name):
    together = models[name].encode(MANY)
    for i, text in enumerate(MANY):
        alone = models[name].encode([text])
        for key, value in alone.tensors.items():
            assert value.shape[1:] == together.tensors[key].shape[1:]
            assert (value.float() - together.tensors[key][i : i + 1].float()).abs().max() < 1e-5
    embeds = together.tensors["embeds"]
    assert (embeds[0] - embeds[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_step_is_replayed_to_the_bit(models, name):
    model = models[name]
    noise, kind = noise_of(model, len(MANY)), FAMILIES[name].stochastic
    plan = Plan((Row(kind, 1.0, trained=True), Row(kind, 0.5, trained=True), *ode_plan(2).rows))
    plan.validate(model.levels(4))
    guidance = Guidance(2.0, model.unconditional()) if FAMILIES[name].guided else None
    route = SamplingPlan(plan, model.levels(4), guidance)
    conditioning, seen, drawn = model.encode(MANY), [noise], {}

    def observe(index, result):
        drawn[index] = result.log_prob
        seen.append(result.x_next)

    sample(model, route, conditioning, noise, draw=lambda i: noise.roll(i + 1), observe=observe)
    for index in plan.trained_steps:
        with torch.no_grad():
            again = route.replay(model, index, seen[index], conditioning, seen[index + 1])
        assert torch.equal(again.log_prob, drawn[index])


@pytest.mark.parametrize("name", NAMES)
def test_latents_and_images_have_each_others_shapes_and_gradients(models, name):
    model = models[name]
    images = torch.rand(2, 3, *model.default_resolution, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images(images).detach().requires_grad_()
    assert latents.shape == (2, *model.latent_shape())
    restored = model.decode(latents)
    assert restored.shape == images.shape
    assert restored.min() >= 0
    assert restored.max() <= 1
    restored.mean().backward()
    assert latents.grad.abs().sum() > 0


def recorded_inputs(module, work):
    """Record the arguments of each call of ``module`` during ``work``, by name or position."""
    calls = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**dict(enumerate(args)), **kwargs}), with_kwargs=True
    )
    work()
    hook.remove()
    return calls


NAMED = {"flux_dev": "pooled_projections guidance txt_ids img_ids encoder_hidden_states", "qwen_image": ""}


@pytest.mark.parametrize("name", NAMED)
def test_in_bfloat16_the_transformer_gets_the_inputs_of_the_pipeline(family_pipelines, name):
    half, family = torch.bfloat16, FAMILIES[name]
    model = load_model(family_pipelines[name], dtype=half, **family.options)
    pipe = DiffusionPipeline.from_pretrained(family_pipelines[name], torch_dtype=half)
    pipe.set_progress_bar_config(disable=True)
    noise = noise_of(model, 2).to(half)
    call = {"latents": packed(pipe, noise), "num_inference_steps": 4, "output_type": "latent", **family.call}
    theirs = recorded_inputs(pipe.transformer, lambda: pipe(prompt=list(TEXTS), **call))
    ours = recorded_inputs(model.raw_denoiser, lambda: images_of(family, model, noise))
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine["timestep"], other["timestep"])
    for key in ["hidden_states", *NAMED[name].split()]:
        assert ours[0][key].dtype == theirs[0][key].dtype
        assert torch.equal(ours[0][key], theirs[0][key]), key


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient_and_leaves_none_out(family_pipelines, name, rank):
    model = load_model(family_pipelines[name], **FAMILIES[name].options)
    if rank and not FAMILIES[name].lora:
        with pytest.raises(ValueError, match=r"lora\.rank 2: .* loads no LoRA into a \w+; train .* lora\.rank: 0"):
            model.train(LoraConfig(rank=rank))
        return
    model.train(LoraConfig(rank=rank))
    model.raw_denoiser.train()
    x, level, conditioning = noise_of(model, 2), model.levels(4)[1], model.encode(TEXTS)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.raw_denoiser.enable_gradient_checkpointing()
        model.predict(x, level, conditioning).square().mean().backward()
        found.append([p.grad for p in model.weights.trainable])
        model.raw_denoiser.zero_grad()
    # DDP waits for a gradient of every trainable weight.
    assert not any(gradient is None for gradient in found[0])
    assert any(gradient.any() for gradient in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Training ---------------------------------------------------------------------------------------------------------


def shared(name, folder, pipeline):
    """Return settings of a run of seconds that moves every weight."""
    return {
        "model": str(pipeline),
        **FAMILIES[name].options,
        "output_dir": folder,
        "lora": LoraConfig(rank=2 if FAMILIES[name].lora else 0),
        "rollout_batch_size": 4,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "learning_rate": 0.02,
    }


def guidance(name):
    """Return the guidance of a run, if the family has one."""
    return {"guidance_scale": 2.0} if FAMILIES[name].guided else {}


def flow_grpo(name, folder, pipeline, pairs):
    plan = PlanConfig(num_steps=3, solver=FAMILIES[name].stochastic)
    args = FlowGRPOConfig(**shared(name, folder, pipeline), plan=plan, num_groups=2, group_size=2, **guidance(name))
    prompts = [Prompt(text) for text in MANY]
    return FlowGRPOTrainer(args=args, reward_funcs=redness, train_dataset=prompts)


def diffusion_dpo(name, folder, pipeline, pairs):
    args = DiffusionDPOConfig(**shared(name, folder, pipeline), train_data=(str(pairs),), num_pairs=4, beta=500.0)
    return DiffusionDPOTrainer(args=args)


def refl(name, folder, pipeline, pairs):
    recipe = RecipeConfig("draft_k", num_steps=3, gradient_steps=2)
    args = ReFLConfig(**shared(name, folder, pipeline), recipe=recipe, num_groups=4, **guidance(name))
    reward = FunctionReward("redness", redness, differentiable=True)
    return ReFLTrainer(args=args, reward_funcs=reward, train_dataset=[Prompt(text) for text in MANY])


def forward_rl(name, folder, pipeline, pairs):
    solver = PlanConfig("ode", num_steps=2)
    args = ForwardRLConfig(
        **shared(name, folder, pipeline), plan=solver, num_groups=2, group_size=2, num_times=1, **guidance(name)
    )
    return ForwardRLTrainer(args=args, reward_funcs=redness, train_dataset=[Prompt(text) for text in MANY])


TRAINERS = {"flow_grpo": flow_grpo, "diffusion_dpo": diffusion_dpo, "refl": refl, "forward_rl": forward_rl}
# SDXL and a packed transformer represent the other families.
DEFAULT = [name for name, family in FAMILIES.items() if not family.slow]
QUICK = {"diffusion_dpo": ("sdxl", "flux_dev"), "refl": ("sdxl", "flux_dev"), "forward_rl": ()}
RUNS = [
    pytest.param(name, kind, marks=[] if name in QUICK.get(kind, DEFAULT) else pytest.mark.slow)
    for name, kind in product(FAMILIES, TRAINERS)
]


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Four pairs of noise, in Pick-a-Pic's columns."""

    def png(seed):
        file = io.BytesIO()
        to_pil_image(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))).save(file, "PNG")
        return file.getvalue()

    row = {"label_0": 1.0, "label_1": 0.0, "has_label": True}
    rows = [{"jpg_0": png(2 * i), "jpg_1": png(2 * i + 1), "caption": f"shape {i}", **row} for i in range(4)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return path


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its model's images, and the ratios of stored steps before the first update."""

    folder: Path
    images: torch.Tensor
    ratios: torch.Tensor | None


@torch.no_grad()
def old_ratios(trainer):
    """Return ratios of the unchanged policy to itself, (trained steps, samples)."""
    batch = collect(trainer, 0)
    buffer, steps = batch.buffer, batch.plan.plan.trained_steps
    ends = [buffer.nodes(torch.arange(4), step + 1) for step in steps]
    return torch.stack([(trainer.algorithm._replay(batch, n).log_prob - buffer.log_prob[n]).exp() for n in ends])


@pytest.fixture(scope="module")
def wanted(request):
    """(family, trainer) of the runs used by the selected tests, so that fast selections skip slow runs."""
    selected = [item.callspec.params for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    return dict.fromkeys((params["name"], params.get("trainer", "flow_grpo")) for params in selected)


@pytest.fixture(scope="module")
def runs(wanted, family_pipelines, pairs, tmp_path_factory):
    """(family, trainer) -> a run of two updates, with images of its export drawn by plain diffusers."""
    root, jobs, found = tmp_path_factory.mktemp("runs"), [], {}
    for name, kind in wanted:
        folder, pipeline = root / f"{name}-{kind}", family_pipelines[name]
        trainer = TRAINERS[kind](name, folder, pipeline, pairs)
        ratios = old_ratios(trainer) if kind == "flow_grpo" else None
        trainer.train()
        noise = noise_of(trainer.model, len(TEXTS))
        save_file({"noise": noise}, folder / "noise.safetensors")
        found[name, kind] = Run(folder, images_of(FAMILIES[name], trainer.model, noise), ratios)
        jobs.append([str(pipeline), str(folder), FAMILIES[name].scale, dict(FAMILIES[name].call)])
    draw_fresh(jobs, loras=sum(FAMILIES[name].lora for name, _ in wanted))
    return found


@pytest.mark.parametrize(("name", "trainer"), RUNS)
def test_exported_weights_sample_the_trainers_images_in_a_fresh_process(runs, name, trainer):
    run = runs[name, trainer]
    fresh = load_file(run.folder / "image.safetensors")
    assert (fresh["image"] - run.images).abs().max() < 1e-5
    assert (run.images - fresh["base"]).abs().max() > 1e-3, "training must matter"


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_load_into_the_model(runs, family_pipelines, name):
    run = runs[name, "flow_grpo"]
    model = load_model(family_pipelines[name], **FAMILIES[name].options)
    noise = noise_of(model, len(TEXTS))
    with with_tuned_weights(model, run.folder):
        assert (images_of(FAMILIES[name], model, noise) - run.images).abs().max() < 1e-5
    assert (images_of(FAMILIES[name], model, noise) - run.images).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_update_every_ratio_is_exactly_one(runs, name):
    ratios = runs[name, "flow_grpo"].ratios
    assert torch.equal(ratios, torch.ones(2, 4))


def test_a_run_and_its_evaluation_use_the_same_embedded_guidance(family_pipelines, tmp_path):
    settings = shared("flux_dev", tmp_path, family_pipelines["flux_dev"]) | {"embedded_guidance": 2.0}
    args = FlowGRPOConfig(**settings, num_groups=1, group_size=2)
    trainer = FlowGRPOTrainer(args=args, reward_funcs=redness, train_dataset=[Prompt("a red circle")])
    assert trainer.model.embedded_guidance == 2.0
    save_yaml(args, tmp_path / "config.yaml")
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    asked = EvaluationConfig(models=(str(tmp_path),), prompts=PROMPTS / "shapes_validation.jsonl", rewards=("shapes",))
    assert resolve(asked, tmp_path / "eval", 1).sampling().embedded_guidance == 2.0
