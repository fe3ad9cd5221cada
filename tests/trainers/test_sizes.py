"""Trainings at sizes other than a square: rectangular resolutions, and aspect-ratio buckets of real images."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, FlowGRPOTrainer
from diffalign.data.buckets import image_sizes, nearest_bucket
from diffalign.data.pairs import load_pairs
from diffalign.diffusion.plan import PlanConfig
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rng import KeyedRNG
from diffalign.trainers.aspect_buckets import make_buckets, model_buckets
from diffalign.trainers.diffusion_dpo.latents import LatentEncoder
from tests.conftest import PIPELINE
from tests.models import tiny_unet_pipelines as tiny
from tests.phases import collect
from tests.reliability.compare import same_checkpoint
from tests.reliability.stops import crash_before
from tests.trainers import made_forward_rl, made_refl

WIDE = (48, 80)
SHAPES = ((64, 64), (96, 64), (64, 96), (40, 120))  # (width, height) of images
redness = made_refl.REDNESS


@pytest.fixture(scope="module")
def mixed(pairs, tmp_path_factory):
    """The twelve pairs, stretched to four aspect ratios in turn; in Pick-a-Pic's columns."""
    rows = []
    for number, row in enumerate(Dataset.from_parquet(str(pairs))):
        for side in ("jpg_0", "jpg_1"):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(row[side])).resize(SHAPES[number % 4]).save(buffer, "PNG")
            row[side] = buffer.getvalue()
        rows.append(row)
    path = tmp_path_factory.mktemp("mixed") / "pairs.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return path


# Rectangular resolutions --------------------------------------------------------------------------------------------


def seen_by(function, shapes):
    def reward(images, prompts, metadata):
        shapes.add(tuple(images.shape[-2:]))
        return function(images, prompts, metadata)

    return reward


LATER = pytest.mark.slow
OTHERS = [pytest.param(name, marks=LATER) for name in ("forward_rl", "refl", "online", "self_play")]


@pytest.mark.parametrize("trainer", ["flow_grpo", "diffusion_dpo", *OTHERS])
def test_every_trainer_trains_at_a_height_and_a_width(trainer, small, dpo, refl, train_prompts, tmp_path):
    shapes, own = set(), {"resolution": WIDE, "max_train_steps": 1}
    reward = seen_by(redness.function, shapes)
    if trainer == "flow_grpo":
        made = FlowGRPOTrainer(args=small(**own), reward_funcs=reward, train_dataset=train_prompts)
    elif trainer == "forward_rl":
        made = made_forward_rl.trainer_of(made_forward_rl.config(tmp_path, **own), reward)
    elif trainer == "refl":
        args = refl(**own)
        made = made_refl.trainer_of(args, train_prompts, reward=dataclasses.replace(redness, function=reward))
    elif trainer == "online":
        options = {"train_data": (), "num_groups": 2, "group_size": 2, "plan": PlanConfig("ode", num_steps=2)}
        made = DiffusionDPOTrainer(args=dpo(**own, **options), reward_funcs=reward, train_dataset=train_prompts)
    else:
        changes = {"losers": "reference", "plan": PlanConfig("ode", num_steps=2)} if trainer == "self_play" else {}
        made, shapes = DiffusionDPOTrainer(args=dpo(**own, **changes)), {WIDE}
    assert made.model.latent_shape()[-2:] == (6, 10)
    if trainer in ("diffusion_dpo", "self_play"):
        assert collect(made).ranked.latents.shape[-2:] == (6, 10)
    made.train()
    assert WIDE in shapes
    assert shapes <= {WIDE, (38, 64)}  # the test images of rewards are smaller


def test_a_size_that_the_model_cannot_draw_names_the_nearest(small, train_prompts):
    with pytest.raises(ValueError, match=r"resolution 64 x 90: .* multiples of 16 pixels; set resolution: \[64, 96\]"):
        FlowGRPOTrainer(args=small(resolution=(64, 90)), train_dataset=train_prompts)


# Buckets ------------------------------------------------------------------------------------------------------------

BUCKETS = {"aspect_buckets": 16, "num_pairs": 3}


def expected_size(sample, model):
    sizes = model_buckets(model, 16)
    return sizes[nearest_bucket(image_sizes(sample), sizes)]


def test_each_batch_has_the_size_of_its_images(dpo, mixed):
    trainer = DiffusionDPOTrainer(args=dpo(train_data=(str(mixed),), **BUCKETS))
    source, seen = trainer.algorithm.source, set()
    for iteration in range(12):
        size, indices = source.buckets.take(iteration)
        assert {expected_size(source.data[index], trainer.model) for index in indices} == {size}
        examples = source.sample(iteration).ranked
        assert examples.latents.shape[-2:] == (size[0] // 8, size[1] // 8)
        assert {own.target_size for sizes in examples.sizes for own in sizes} == {size}
        seen.add(size)
    assert {(64, 64), (80, 48), (48, 80)} <= seen
    trainer.train()


def test_blank_images_of_two_sizes_are_cached_apart(frozen, tmp_path):
    """Their bytes are equal."""
    prompts = PromptEmbeddingCache(frozen, folder=tmp_path)
    run = SimpleNamespace(config=DiffusionDPOConfig(model="m"), model=frozen, prompts=prompts, rng=None, share=range)
    encoder = LatentEncoder(run)
    for height, width in ((48, 80), (80, 48)):
        latent = encoder._latent(torch.full((3, height, width), 255, dtype=torch.uint8))
        assert latent.shape[-2:] == (height // 8, width // 8)


@pytest.mark.parametrize("loss", ["kto", pytest.param("dpo", marks=LATER)])
@pytest.mark.parametrize("losers", ["data", "reference"])
def test_single_images_and_self_play_have_buckets(dpo, mixed, loss, losers):
    if losers == "reference" and loss == "kto":
        return
    changes = {"loss": loss, "losers": losers, "train_data": (str(mixed),)}
    changes |= {"plan": PlanConfig("ode", num_steps=2)} if losers == "reference" else {}
    trainer = DiffusionDPOTrainer(args=dpo(**changes, **BUCKETS))
    shapes = {collect(trainer, iteration).ranked.latents.shape[-2:] for iteration in range(6)}
    assert len(shapes) > 1
    trainer.train()


@LATER
def test_resume_sees_the_same_batches(dpo, mixed, tmp_path):
    common = {"train_data": (str(mixed),), "max_train_steps": 6, "checkpointing_steps": 3, **BUCKETS}
    DiffusionDPOTrainer(args=dpo(output_dir=tmp_path / "a", **common)).train()
    broken = dpo(output_dir=tmp_path / "b", **common)
    crash_before(DiffusionDPOTrainer(args=broken), 4)
    DiffusionDPOTrainer(args=dataclasses.replace(broken, resume_from_checkpoint="latest")).train()
    same_checkpoint(tmp_path / "a/checkpoint-6", tmp_path / "b/checkpoint-6")


def test_two_processes_sort_the_images_that_one_sorts(mixed, frozen):
    data, own = load_pairs(mixed), []

    def buckets(rank, world):
        def gather(found):
            own.extend(found)
            return list(own)

        run = SimpleNamespace(rank=rank, world=world, model=frozen, rng=KeyedRNG(0), gather_objects=gather)
        return make_buckets(run, data, range(len(data)), 16, 3, "data")

    alone = buckets(0, 1)
    own.clear()
    buckets(0, 2)
    both = buckets(1, 2)  # has what the first process found, then its own
    assert list(both.of) == list(alone.of)
    assert [both.take(i) for i in range(20)] == [alone.take(i) for i in range(20)]


@pytest.mark.parametrize("preset", [pytest.param(name, marks=LATER) for name in ("imagerefl", "refl_script")])
def test_real_images_of_refl_have_buckets(refl, mixed, train_prompts, preset):
    recipe = {} if preset == "imagerefl" else {"regulariser": "pretraining"}
    shapes = set()
    reward = dataclasses.replace(redness, function=seen_by(redness.function, shapes))
    data = dataclasses.replace(refl(preset).data, scan=4)
    args = refl(preset, recipe, train_images=(str(mixed),), data=data, aspect_buckets=16, num_groups=2)
    trainer = made_refl.trainer_of(args, train_prompts, reward=reward)
    pictures, found = trainer.algorithm.pictures, set()
    for iteration in range(6):
        latents, _, sizes = pictures(iteration, range(2))
        assert {(8 * latents.shape[-2], 8 * latents.shape[-1])} == {size.target_size for size in sizes}
        found.add(sizes[0].target_size)
    assert len(found) > 1
    trainer.train()
    assert (shapes - {(64, 64)} != set()) == (preset == "imagerefl")


@LATER
def test_refl_noises_images_of_a_bucket_to_the_levels_of_its_size(refl, mixed, train_prompts, tmp_path):
    """A scheduler that shifts with the number of tokens, as those of Qwen-Image and FLUX do."""
    model = tmp_path / "model"
    shutil.copytree(PIPELINE, model)
    path = model / "scheduler/scheduler_config.json"
    shift = {"base_image_seq_len": 4, "max_image_seq_len": 64, "base_shift": 0.1, "max_shift": 2.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **shift, "use_dynamic_shifting": True}))
    data = dataclasses.replace(refl("imagerefl").data, scan=4)
    more = {"train_images": (str(mixed),), "data": data, "aspect_buckets": 16, "num_groups": 2}
    args = refl("imagerefl", {}, model=str(model), **more)
    trainer = made_refl.trainer_of(args, train_prompts)
    algorithm, seen, predict = trainer.algorithm, [], trainer.model.predict

    def watched(x, level, *rest):
        seen.append(((8 * x.shape[-2], 8 * x.shape[-1]), level))
        return predict(x, level, *rest)

    trainer.model.predict = watched
    for iteration in range(6):
        batch = collect(trainer, iteration)
        (minibatch,) = algorithm.minibatches(batch, iteration)
        algorithm.loss(minibatch.micros[0])
    steps, sizes = algorithm.recipe.num_steps, {size for size, _ in seen}
    of = {size: trainer.model.levels(steps, args.schedule, size).sigma.double() for size in sizes}
    assert len({tuple(sigmas.tolist()) for sigmas in of.values()}) > 1
    assert all((level.sigma.double().flatten()[0] - of[size]).abs().min() == 0 for size, level in seen)


@LATER
def test_sdxl_is_told_size_crop_and_bucket(dpo, mixed, tmp_path):
    """As in its training: the size before resizing, the crop after it, and the size of the bucket."""
    tiny.build("sdxl", tmp_path / "sdxl")
    options = {"model": str(tmp_path / "sdxl"), "max_sequence_length": None, "resolution": 64, "cache": False}
    trainer = DiffusionDPOTrainer(args=dpo(**options, train_data=(str(mixed),), prompt_dropout=0.0, **BUCKETS))
    seen, predict = [], trainer.model.predict
    trainer.model.predict = lambda x, level, conditioning, *rest: (
        seen.append((conditioning.tensors["time_ids"], tuple(8 * side for side in x.shape[-2:])))
        or predict(x, level, conditioning, *rest)
    )
    scale = trainer.model.pipeline.vae_scale_factor
    for iteration in range(6):
        batch = collect(trainer, iteration)
        trainer.algorithm.denoise(batch.ranked, torch.arange(3), iteration)
        size, indices = trainer.algorithm.source.buckets.take(iteration)
        rows = seen[-1][0].tolist()
        for row, index in zip(rows, indices, strict=False):  # winners first
            original = image_sizes(trainer.algorithm.source.data[index])[0]
            assert tuple(row[:2]) == original
            ratio = max(size[0] / original[0], size[1] / original[1])
            for extra, place in zip(
                (original[0] * ratio - size[0], original[1] * ratio - size[1]), row[2:4], strict=True
            ):
                assert place == (int(extra) + 1) // 2
            assert tuple(row[4:]) == size
        assert batch.ranked.latents.shape[-2:] == (size[0] // scale, size[1] // scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aspect_buckets": 24}, r"aspect_buckets 24: .* multiples of 16 pixels; give 32"),
        (
            {"aspect_buckets": 64},
            r"aspect_buckets 64: 64 x 64 is the only size of its area; give a smaller step, such as 16",
        ),
        (
            {"aspect_buckets": 16, "streaming": True},
            "aspect_buckets: the sizes of all images must be known",
        ),
        ({"aspect_buckets": 16, "train_data": (), "rewards": {"shapes": 1.0}}, "aspect_buckets: read only offline"),
        ({"aspect_buckets": -1}, "aspect_buckets must be at least 0"),
    ],
)
def test_buckets_that_cannot_be_are_refused(dpo, changes, message, train_prompts):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOTrainer(args=dpo(**changes), train_dataset=None if changes.get("train_data", 1) else train_prompts)


def test_buckets_without_real_images_are_refused(refl):
    with pytest.raises(ValueError, match="aspect_buckets: read only with train_images"):
        refl(aspect_buckets=16).validate()
