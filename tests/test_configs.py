"""Every configuration that the repository ships resolves."""

from pathlib import Path

import pytest
import yaml

from diffalign.cli import TRAINERS
from diffalign.config import parse
from diffalign.data.pairs import load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.models import FAMILIES
from diffalign.rewards import get_reward
from diffalign.rewards.settings import build_rewards

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in TRAINERS for path in (ROOT / "configs" / name).glob("*.yaml"))


# The pipelines of the hub's models, which cannot be asked for here: model_index.json, "_class_name".
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
}


def pipeline_class(model):
    return HUB.get(model) or yaml.safe_load((Path(model) / "model_index.json").read_text())["_class_name"]


def training_texts(args):
    """Of prompts, or of images with captions."""
    if args.train_prompts:
        return {p.text for p in load_prompts(args.train_prompts)}
    data = load_pairs(*getattr(args, "train_data", ()) or args.train_images, settings=args.data)
    return {data[i].prompt.text for i in range(len(data))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_training_config_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse(TRAINERS[path.parent.name][0], ["--config", str(path)])
    args.validate()
    assert pipeline_class(args.model) in FAMILIES
    build_rewards(args.rewards)
    build_rewards(getattr(args, "held_out", {}))
    assert all(get_reward(name) for name in args.eval_rewards)
    if args.model in HUB:
        return  # the prompts of real models are the user's own
    assert not training_texts(args) & {p.text for p in load_prompts(args.eval_prompts)}


def test_there_is_a_quickstart():
    assert any(path.name == "shapes.yaml" for path in FILES)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_config_is_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
