"""The shipped pipeline: small, loadable with plain defaults, and good but improvable."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from diffalign.data.prompts import load_prompts
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.shapes import TAGS, judge_batch
from diffalign.shapes.captions import OPENINGS, is_held_out, is_novel, phrase, specs
from tests.conftest import PIPELINE, PROMPTS, ROOT


def strict(images, prompts):
    return torch.tensor([v.strict for v in judge_batch(images, [p.metadata for p in prompts])]).float()


def by_tag(right, prompts):
    return {t: right[[i for i, p in enumerate(prompts) if p.metadata["tag"] == t]].mean().item() for t in TAGS}


def test_the_pipeline_is_small_and_in_half_precision():
    assert sum(f.stat().st_size for f in PIPELINE.rglob("*") if f.is_file()) <= 15 * 2**20
    index = json.loads((PIPELINE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"):
        assert index[part][1] is not None, part
        assert list((PIPELINE / part).glob("*.safetensors")), part


SPLIT = ("train", "train_long", "validation", "test")
WEIGHTED = {"single_object": 140, "two_object": 420, "counting": 420, "colors": 140, "position": 280, "color_attr": 400}


def prompts_of(part):
    return load_prompts(PROMPTS / f"shapes_{part}.jsonl")


@pytest.mark.parametrize("name", SPLIT)
def test_prompt_files_cover_all_tasks(name):
    prompts = prompts_of(name)
    assert {tag: sum(p.metadata["tag"] == tag for p in prompts) >= 70 for tag in TAGS} == dict.fromkeys(TAGS, True)
    if name in ("validation", "test"):
        assert len({p.text for p in prompts}) == len(prompts) >= 420


def test_the_weighted_prompts_are_those_of_the_long_set_with_more_of_the_hard_tasks():
    prompts, every = prompts_of("train_weighted"), prompts_of("train_long")
    assert {p.text for p in prompts} <= {p.text for p in every}
    assert {tag: sum(p.metadata["tag"] == tag for p in prompts) for tag in TAGS} == WEIGHTED


@pytest.mark.parametrize("name", ["validation", "test"])
def test_held_out_prompts_share_no_text_and_no_held_out_combination_with_training(name):
    held_out, train = prompts_of(name), [*prompts_of("train"), *prompts_of("train_long")]
    assert not {p.text for p in train} & {p.text for p in held_out}
    novel = [p for p in held_out if p.metadata["tag"] in ("colors", "position", "color_attr")]
    assert len(novel) >= 210
    assert all(is_novel(p.metadata) for p in novel)
    assert not any(is_novel(p.metadata) for p in train)


def test_no_test_prompt_is_in_another_file_or_in_what_the_base_was_built_on():
    """``wording`` (captions of the base) and ``caption`` (of the pairs) keep to one side of the split."""
    prompts = prompts_of("test")
    texts = {p.text for p in prompts}
    for name in ("train", "train_long", "validation"):
        assert not texts & {p.text for p in prompts_of(name)}, name
    built_on = {
        opening + phrase(spec) for tag in TAGS for spec in specs(tag) for opening in OPENINGS
        if not is_held_out(spec, opening)
    }  # fmt: skip
    assert not texts & built_on
    pairs = pq.read_table(ROOT / "assets/preferences/shapes.parquet", columns=["caption"]).column("caption").to_pylist()
    assert not texts & set(pairs)


@pytest.mark.parametrize("tag", ["position", "color_attr"])
def test_no_combination_of_a_test_prompt_is_in_another_file(tag):
    """In either order; the other tasks have three to nine combinations in all, too few for a second set."""
    test, *others = ({unordered(p) for p in prompts_of(name) if p.metadata["tag"] == tag} for name in reversed(SPLIT))
    assert len(test) >= 9
    assert not [name for name, found in zip(("validation", "train_long", "train"), others, strict=True) if test & found]


def unordered(prompt):
    return tuple(sorted(json.dumps(entry, sort_keys=True) for entry in prompt.metadata["include"]))


@pytest.mark.slow
def test_the_base_is_good_but_improvable(frozen):
    """Without guidance, right on 30 to 60 % of held-out prompts, and above chance on every task."""
    prompts = load_prompts(PROMPTS / "shapes_validation.jsonl")
    own = torch.arange(len(prompts))
    addresses = NoiseKeys(KeyedRNG(0), "evaluation", 0, own, torch.zeros_like(own))
    route = SamplingPlan(ode_plan(8), frozen.levels(8))
    conditioning = frozen.encode([p.text for p in prompts])
    images = torch.cat([i for _, i in generate(frozen, route, conditioning, own, addresses, 64)])
    right = strict(images, prompts)
    assert 0.30 <= right.mean() <= 0.60
    # Chance: the same images judged by the captions of other prompts of their task.
    shuffled = [
        prompts[i - 1] if prompts[i - 1].metadata["tag"] == p.metadata["tag"] else prompts[i + 69]
        for i, p in enumerate(prompts)
    ]
    chance = by_tag(strict(images, shuffled), prompts)
    for tag, rate in by_tag(right, prompts).items():
        assert rate > chance[tag], tag


@pytest.mark.parametrize(
    "tag", ["single_object", *(pytest.param(t, marks=pytest.mark.slow) for t in ("colors", "position", "color_attr"))]
)
def test_plain_defaults_of_diffusers_draw_the_prompt(pipeline, tag):
    """No argument but the prompt: 28 steps, guidance 7, 256 T5 tokens."""
    prompts = [p for p in load_prompts(PROMPTS / "shapes_train.jsonl") if p.metadata["tag"] == tag][:12]
    images = pipeline([p.text for p in prompts], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape[-2:] == (64, 64)
    assert strict(images, prompts).mean() >= 0.4
