"""Families that edit a source image: the pipelines' images, every trainer, and LoRAs that plain diffusers loads."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image, ImageOps
from safetensors.torch import load_file

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
from diffalign.data.config import PreferenceDataConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.models import load_model
from diffalign.models.editing import check_source_column, check_sources
from diffalign.models.pipeline_call import Sampled, pipeline_call
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rewards.base import FunctionReward
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import EditInput
from diffalign.trainers.diffusion_dpo.latents import LatentEncoder
from tests.models import tiny_edit_pipelines as edits
from tests.models import tiny_unet_pipelines as tiny
from tests.phases import collect

TEXTS = ["a red circle", "a blue square left of a yellow circle", "three triangles"]
OPTIONS = {"max_sequence_length": 24, "resolution": 16}
CALLS = {
    "flux_kontext": lambda h, w: {"height": h, "width": w, "max_area": h * w, "_auto_resize": False},
    "qwen_image_edit": lambda h, w: {"height": h, "width": w},
}
NEGATIVES = {"flux_kontext": "", "qwen_image_edit": " "}
# The pairs of trainer and family that default tests train.
FIRST = (("flow_grpo", "flux_kontext"), ("diffusion_dpo", "qwen_image_edit"))


@pytest.fixture(autouse=True)
def _small_sources(monkeypatch):
    """Qwen-Image-Edit's pipeline enlarges a source to a million pixels."""
    own = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: own(32 * 32, ratio))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    root = tmp_path_factory.mktemp("edits")
    for name, build in edits.FAMILIES.items():
        tiny.write(build, root / name)
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return edits.write_sources(tmp_path_factory.mktemp("sources"), (24, 20))


@pytest.fixture(scope="module")
def prompts(sources):
    return [Prompt(text, {"image": str(path)}) for text, path in zip(TEXTS, sources, strict=True)]


def plain(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_by(pipe, noise, prompts, size, steps, scale=1.0):
    """One image at a time, because the pipelines take one size of sources per call."""
    name, images = {"FluxKontextPipeline": "flux_kontext"}.get(type(pipe).__name__, "qwen_image_edit"), []
    guided = {"true_cfg_scale": scale, **({"negative_prompt": NEGATIVES[name]} if scale != 1 else {})}
    for one, prompt in zip(noise, prompts, strict=True):
        seen = size[::-1]
        if name == "qwen_image_edit":
            seen = pipeline_qwenimage_edit.calculate_dimensions(0, size[1] / size[0])[:2]
        source = ImageOps.fit(Image.open(prompt.metadata["image"]), seen, Image.Resampling.LANCZOS)
        latents = pipe._pack_latents(one[None], *one[None].shape)
        call = {**CALLS[name](*size), **guided, "max_sequence_length": 24}
        images.append(
            pipe(source, prompt.text, latents=latents, num_inference_steps=steps, output_type="pt", **call).images
        )
    return torch.cat(images)


@torch.no_grad()
def ours(model, noise, prompts, steps, scale=1.0):
    cache = PromptEmbeddingCache(model)
    route = SamplingPlan(ode_plan(steps), model.levels(steps), cache.guidance(scale) if scale != 1 else None)
    return model.decode(sample(model, route, cache([prompt.input for prompt in prompts]), noise))


@pytest.mark.parametrize("name", edits.FAMILIES)
@pytest.mark.parametrize("size", [pytest.param((16, 16), marks=pytest.mark.slow), (16, 32)])
def test_our_ode_draws_the_pipelines_images(pipelines, prompts, name, size):
    model, pipe = load_model(pipelines / name, **{**OPTIONS, "resolution": size}), plain(pipelines / name)
    noise = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 3.0):
        images = ours(model, noise, prompts, 4, scale)
        assert images.shape == (3, 3, *size)
        assert (images - drawn_by(pipe, noise, prompts, size, 4, scale)).abs().max() < 2e-5 * scale
    other = [prompt.metadata["image"] for prompt in prompts[::-1]]
    swapped = [Prompt(prompt.text, {"image": path}) for prompt, path in zip(prompts, other, strict=True)]
    assert (ours(model, noise, swapped, 4)[0] - ours(model, noise, prompts, 4)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", edits.FAMILIES)
def test_the_snippet_draws_with_the_same_settings(pipelines, name):
    model = load_model(pipelines / name, **OPTIONS)
    call = pipeline_call(model, Sampled(4))
    size = model.source_size((16, 16))
    assert call.setup[-1].startswith(f'source = ImageOps.fit(load_image("source.png"), {size},')
    assert call.arguments.items() >= {key: str(value) for key, value in CALLS[name](16, 16).items()}.items()


def shared(folder, pipeline):
    return {
        "model": str(pipeline),
        **OPTIONS,
        "output_dir": folder,
        "lora": LoraConfig(rank=2),
        "rollout_batch_size": 4,
        "train_batch_size": 4,
        "max_train_steps": 1,
        "learning_rate": 0.05,
        "guidance_scale": 2.0,
    }


def redness(images, prompts, metadata):
    assert all(Path(entry["image"]).is_absolute() for entry in metadata)
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def redder(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def trainer_of(kind, args, prompts):
    plan, few = PlanConfig("ode", num_steps=3), {"num_groups": 2, "group_size": 2}
    if kind == "flow_grpo":
        config = FlowGRPOConfig(**args, plan=PlanConfig(num_steps=3), **few)
        return FlowGRPOTrainer(args=config, reward_funcs=redness, train_dataset=prompts)
    if kind == "forward_rl":
        config = ForwardRLConfig(**args, plan=plan, **few)
        return ForwardRLTrainer(args=config, reward_funcs=redness, train_dataset=prompts)
    if kind == "refl":
        config = ReFLConfig(**args, recipe=RecipeConfig("draft_1", num_steps=3), **few)
        reward = FunctionReward("redness", redness, differentiable=True)
        return ReFLTrainer(args=config, reward_funcs=reward, train_dataset=prompts)
    config = DiffusionDPOConfig(**args, plan=plan, beta=500.0, prompt_dropout=0.5, **few)
    return DiffusionDPOTrainer(args=config, reward_funcs=redness, train_dataset=prompts)


@pytest.mark.parametrize("preset", ["imagerefl", "draft_1"])
def test_refl_fits_sources_to_the_bucket_of_their_results(pipelines, sources, tmp_path, monkeypatch, preset):
    """The data name sources relative to their own folder."""
    (tmp_path / "data").mkdir()
    rows = []
    for number, size in enumerate([(64, 16), (16, 64)] * 2):
        shutil.copy(sources[number % 3], tmp_path / f"data/source-{number}.png")
        Image.new("RGB", size, (60 * number, 90, 20)).save(tmp_path / f"data/{number}.png")
        source = {"image": f"source-{number}.png"}
        rows.append({"image": f"{number}.png", "prompt": f"make it {number}", "liked": True, "metadata": source})
    (tmp_path / "data/images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {} if preset == "imagerefl" else {"regulariser": "pretraining", "regulariser_weight": 1.0}
    recipe = RecipeConfig(preset, num_steps=3, reward_loss="negative", **own)
    few = {"num_groups": 2, "group_size": 1, "train_images": (str(tmp_path / "data/images.jsonl"),)}
    settings = {**shared(tmp_path / "run", pipelines / "flux_kontext"), **few, "aspect_buckets": 8}
    own = None if preset == "imagerefl" else [Prompt("a star", {"image": str(sources[0])})] * 2
    trainer = ReFLTrainer(
        args=ReFLConfig(**settings, recipe=recipe),
        reward_funcs=FunctionReward("redder", redder, differentiable=True),
        train_dataset=own,
    )
    seen, predict = set(), trainer.model.predict

    def noted(x, level, conditioning, *rest):
        seen.add((tuple(x.shape[-2:]), tuple(conditioning.tensors["source"].shape[-2:])))
        return predict(x, level, conditioning, *rest)

    monkeypatch.setattr(trainer.model, "predict", noted)
    for iteration in range(2):
        batch = trainer.algorithm.sample(iteration)
        ((micro,),) = (minibatch.micros for minibatch in trainer.algorithm.minibatches(batch, iteration))
        trainer.algorithm.loss(micro)
    assert len(seen) > 1
    assert all(result == source for result, source in seen)


@pytest.mark.parametrize("name", ["random_crop", "random_flip"])
def test_pairs_that_would_move_without_their_sources_are_refused(name):
    run = SimpleNamespace(config=DiffusionDPOConfig(model="m", **{name: True}), model=SimpleNamespace(edits=True))
    with pytest.raises(ValueError, match=f"{name}: the sources that a model edits would stay as they are"):
        LatentEncoder(run)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in FIRST else pytest.mark.slow)
        for kind in ("flow_grpo", "forward_rl", "diffusion_dpo", "refl")
        for name in edits.FAMILIES
    ],
)
def test_every_trainer_trains_and_diffusers_loads_the_lora(pipelines, prompts, tmp_path, name, kind):
    trainer = trainer_of(kind, shared(tmp_path, pipelines / name), prompts)
    trainer.train()
    model, pipe = trainer.model, plain(pipelines / name)
    noise = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    before = drawn_by(pipe, noise, prompts, (16, 16), 3)
    pipe.load_lora_weights(tmp_path)
    loaded = {n for n, _ in pipe.transformer.named_parameters() if "lora_" in n}
    assert len(loaded) == len(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    images = ours(model, noise, prompts, 3)
    assert (drawn_by(pipe, noise, prompts, (16, 16), 3) - images).abs().max() < 2e-5
    assert (before - images).abs().max() > 1e-4, "training must matter"


@pytest.mark.parametrize("name", edits.FAMILIES)
def test_replayed_steps_have_ratio_one(pipelines, prompts, tmp_path, name):
    trainer = trainer_of("flow_grpo", shared(tmp_path, pipelines / name), prompts)
    batch = collect(trainer)
    buffer = batch.buffer
    for step in batch.plan.plan.trained_steps:
        nodes = buffer.nodes(torch.arange(4), step + 1)
        with torch.no_grad():
            again = trainer.algorithm._replay(batch, nodes)
        assert torch.equal(again.log_prob, buffer.log_prob[nodes])


def test_a_dropped_instruction_keeps_its_source(pipelines, prompts, tmp_path):
    trainer = trainer_of("diffusion_dpo", shared(tmp_path, pipelines / "flux_kontext"), prompts)
    forward = trainer.algorithm.forward
    given = [prompt.input for prompt in prompts]
    rows = forward._encoded(given, [False, True, False])
    whole, empty = forward.run.prompts(given), forward.run.prompts([given[1]._replace(text="")])
    assert torch.equal(rows.tensors["source"], whole.tensors["source"])
    assert torch.equal(rows.tensors["embeds"][1], empty.tensors["embeds"][0])
    assert torch.equal(rows.tensors["embeds"][0], whole.tensors["embeds"][0])


def test_a_cached_row_follows_the_content_of_its_source(pipelines, sources, tmp_path):
    model = load_model(pipelines / "flux_kontext", **OPTIONS)
    path = tmp_path / "one.png"
    given = EditInput("a red circle", str(path))
    found = []
    for source in sources[:2]:
        path.write_bytes(source.read_bytes())
        for _ in range(2):
            found.append(PromptEmbeddingCache(model, folder=tmp_path / "cache")([given]).tensors["source"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"'a red circle' has no source image, and this model edits one: add .* prompts.parquet\?image=COLUMN"),
        (
            {"image": "/nowhere/one.png"},
            r"source image /nowhere/one.png of 'a red circle': no such file.*check the path",
        ),
        ({"image": __file__}, r"source image .*test_editing.py of 'a red circle': not an image; check the path"),
    ],
)
def test_prompts_without_a_source_are_refused_before_training(pipelines, tmp_path, metadata, message):
    config = FlowGRPOConfig(**shared(tmp_path, pipelines / "flux_kontext"), num_groups=2, group_size=2)
    with pytest.raises(ValueError, match=message):
        FlowGRPOTrainer(args=config, reward_funcs=redder, train_dataset=[Prompt("a red circle", metadata)])


@pytest.mark.parametrize("source", [None, "none.png"])
def test_pairs_without_a_source_are_refused_before_training(pipelines, sources, tmp_path, source):
    metadata = {} if source is None else {"metadata": {"image": source}}
    images = {"image_0": str(sources[0]), "image_1": str(sources[1])}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "make it red", "label": 1, **images, **metadata}))
    data = PreferenceDataConfig(allow_outside=True)
    shown = "make it red" if source is None else "none.png of 'make it red': no such file"
    args = {**shared(tmp_path / "run", pipelines / "flux_kontext"), "train_data": (str(tmp_path / "pairs.jsonl"),)}
    with pytest.raises(ValueError, match=shown):
        DiffusionDPOTrainer(args=DiffusionDPOConfig(**args, data=data))


@pytest.mark.slow
def test_offline_pairs_are_learned_with_the_source_of_each(pipelines, sources, tmp_path):
    """Of one instruction, named in a column, and bit for bit the same after a resume."""
    first, second, third = map(str, sources[:3])
    rows = [
        {"prompt": "make it red", "chosen": chosen, "rejected": third, "before": before}
        for chosen, before in ((first, second), (second, first))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained(name, **more):
        args = {"model": str(pipelines / "flux_kontext"), **OPTIONS, "output_dir": tmp_path / name, **more}
        args |= {"lora": LoraConfig(rank=2), "learning_rate": 0.05, "max_train_steps": 2, "checkpointing_steps": 1}
        args |= {"num_pairs": 2, "train_batch_size": 2, "train_data": (str(tmp_path / "pairs.jsonl"),)}
        data = PreferenceDataConfig(allow_outside=True, source="before")
        trainer = DiffusionDPOTrainer(args=DiffusionDPOConfig(**args, data=data))
        trainer.train()
        return trainer

    trainer = trained("run")
    examples = trainer.algorithm.sample(0).ranked
    assert {Path(given.image).name for given in examples.texts} == {Path(source).name for source in sources[:2]}
    seen = trainer.run.prompts(examples.texts).tensors["source"]
    assert not torch.equal(seen[0], seen[1])
    resumed = trained("resumed", resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    files = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "resumed")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert resumed.loop.progress.step == 2


def test_a_column_of_sources_is_refused_for_a_model_that_does_not_edit(frozen):
    with pytest.raises(
        ValueError, match=r"data\.source before: a StableDiffusion3Pipeline edits no images: leave it out"
    ):
        check_source_column(frozen, "before")
    run = SimpleNamespace(config=DiffusionDPOConfig(model="m", data=PreferenceDataConfig(source="b")), model=frozen)
    with pytest.raises(ValueError, match="edits no images"):
        LatentEncoder(run)


def test_other_models_ignore_sources(frozen, prompts):
    check_sources(frozen, [Prompt("a red circle")])
    with_source, bare = (PromptEmbeddingCache(frozen)([given]) for given in (prompts[0].input, prompts[0].text))
    assert all(torch.equal(with_source.tensors[name], bare.tensors[name]) for name in bare.tensors)
