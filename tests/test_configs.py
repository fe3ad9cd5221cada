"""Every configuration that the repository ships resolves, and fits on the card that it names."""

from pathlib import Path

import pytest
import yaml

from diffalign.config import parse
from diffalign.data.pairs import load_pairs
from diffalign.data.prompt_source import LISTED
from diffalign.data.prompts import count_prompts, load_prompts
from diffalign.models import family_names
from diffalign.preflight import inspect, not_needed_to_forecast
from diffalign.rewards import get_reward
from diffalign.rewards.config import build_rewards
from diffalign.structures import EditInput
from diffalign.trainers.registry import algorithm_names, config_class
from tests.hub_stand_in import LAYOUTS, stand_in

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in algorithm_names() for path in (ROOT / "configs" / name).glob("*.yaml"))


# The pipelines of the hub's models, which cannot be asked for here: model_index.json, "_class_name".
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "black-forest-labs/FLUX.1-Kontext-dev": "FluxKontextPipeline",
    "black-forest-labs/FLUX.2-klein-base-4B": "Flux2KleinPipeline",
    "Qwen/Qwen-Image": "QwenImagePipeline",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "SanaPipeline",
    "Tongyi-MAI/Z-Image-Turbo": "ZImagePipeline",
}


def pipeline_class(model):
    return HUB.get(model) or yaml.safe_load((Path(model) / "model_index.json").read_text())["_class_name"]


def training_inputs(args):
    """Of prompts, or of images with captions."""
    if args.train_prompts:
        return {p.input for p in load_prompts(args.train_prompts)}
    data = load_pairs(*getattr(args, "train_data", ()) or args.train_images, settings=args.data)
    return {data[i].prompt.text for i in range(len(data))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_training_config_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse(config_class(path.parent.name), ["--config", str(path)])
    args.validate()
    assert pipeline_class(args.model) in family_names()
    build_rewards(args.rewards)
    build_rewards(getattr(args, "held_out", {}))
    assert all(get_reward(name) for name in args.eval_rewards)
    if args.model in HUB:
        return  # see below
    assert not training_inputs(args) & {p.input for p in load_prompts(args.eval_prompts)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        put = stand_in(tmp_path_factory.mktemp("hub"), patch)
        put(LISTED["pickapic"].source, **LAYOUTS["pickapic"])
        yield


def content(prompt):
    """A text, with the source image of an edit, whose instructions are often the same."""
    return (prompt.text, Path(prompt.input.image).read_bytes() if isinstance(prompt.input, EditInput) else b"")


REAL = [path for path in FILES if not path.stem.startswith("shapes")]


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_prompts_of_a_real_model_s_preset_resolve_without_a_file_beside_it(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse(config_class(path.parent.name), ["--config", str(path)])
    test = load_prompts(args.eval_prompts)
    assert test
    if path.parent.name != "diffusion_dpo":
        train = {content(prompt) for prompt in load_prompts(args.train_prompts)}
        assert len(train) > len(test)
        assert not train & {content(prompt) for prompt in test}


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_forecast_of_a_real_model_s_preset_needs_no_network(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    args = parse(config_class(path.parent.name), ["--config", str(path)])
    inspect(args, skip=("model", *not_needed_to_forecast(args)))
    assert count_prompts(args.eval_prompts)


# What a header promises --------------------------------------------------------------------------------------------

# Data sets that are no longer on the hub.
GONE = ("yuvalkirstain/pickapic_v1", "yuvalkirstain/pickapic_v2")
# Of yifan123/flow_grpo: config/base.py and config/grpo.py, with the steps between evaluations in optimizer steps (two
# an iteration), and the scripts' own LoRA, text tokens and moving average (0.9 every eight steps).
FLOW_GRPO = {
    "max_sequence_length": 128,
    "resolution": 512,
    "learning_rate": 3e-4,
    "adam_weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "advantage_clip": 5.0,
    "clip_range": 1e-4,
    "clip_unit": "per_dim",
    "advantage_std": "global",
    "shared_start": False,
    "updates_per_rollout": 2,
}
SD3 = {"lora": (32, 64.0, 10, 0.7), "guidance_scale": 4.5, "eval_num_steps": 40, "eval_steps": 120}
MANY, FEW = {"num_groups": 48, "group_size": 24}, {"num_groups": 8, "group_size": 8, "train_batch_size": 8}
PUBLISHED = {
    **{f"sd35_medium_{task}_8gpu": SD3 | MANY | {"kl_beta": kl} for task, kl in (("ocr", 0.04), ("geneval", 0.04))},
    "sd35_medium_pickscore_8gpu": SD3 | MANY | {"kl_beta": 0.01},
    "sd35_medium_ocr_1gpu": SD3 | FEW | {"kl_beta": 0.04},
    "flux1_dev_pickscore_8gpu": MANY
    | {"lora": (64, 128.0, 6, 0.9), "embedded_guidance": 3.5, "eval_num_steps": 28, "eval_steps": 60, "kl_beta": 0.0}
    | {"train_batch_size": 3},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_flow_grpo_are_the_authors(name):
    args = parse(config_class("flow_grpo"), ["--config", str(ROOT / f"configs/flow_grpo/{name}.yaml")])
    wanted = FLOW_GRPO | PUBLISHED[name]
    shape = (args.lora.rank, args.lora.alpha, args.plan.num_steps, args.plan.noise_level)
    assert {key: shape if key == "lora" else getattr(args, key) for key in wanted} == wanted
    assert args.ema_decay**8 == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in PUBLISHED or "1gpu" in p.stem], ids=lambda p: p.stem)
def test_a_header_says_what_differs_or_was_not_published(path):
    header = path.read_text(encoding="utf-8").split("model:")[0]
    if "image_reward" not in path.stem:
        assert "epartures" in header
    if path.stem in ("sd35_medium_geneval_1gpu", "sd35_medium_pickscore_1gpu"):
        assert "were not published" in header
        assert "as published" not in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_preset_names_data_that_are_gone(path):
    assert not [name for name in GONE if name in path.read_text(encoding="utf-8")]


def test_no_message_or_default_names_data_that_are_gone():
    sources = [*(ROOT / "diffalign").rglob("*.py"), ROOT / "README.md"]
    assert not [path for path in sources if any(name in path.read_text(encoding="utf-8") for name in GONE)]


# A file per trainer and model: configs/<trainer>/<model>.yaml -------------------------------------------------------

MODELS = ("sd15", "sdxl", "sd35_medium", "flux1_dev")
CHOSEN = {"gradient_checkpointing", "decode_slice", "vae_checkpointing", "offload", "quantise"}
CHOSEN |= {"rollout_batch_size", "train_batch_size", "eval_batch_size"}


@pytest.mark.parametrize("trainer", algorithm_names())
def test_every_model_has_one_file_for_all_cards(trainer):
    found = {path.stem for path in REAL if path.parent.name == trainer}
    assert found >= set(MODELS)
    assert not [name for name in found if name.endswith("gb")]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("trainer", algorithm_names())
def test_memory_chooses_what_a_card_needs(trainer, model):
    """The files say what a run computes."""
    args = parse(config_class(trainer), ["--config", str(ROOT / f"configs/{trainer}/{model}.yaml")])
    assert args.memory == "auto"
    assert not CHOSEN & args.given.names


def test_there_is_a_quickstart():
    assert any(path.name == "shapes.yaml" for path in FILES)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_config_is_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
