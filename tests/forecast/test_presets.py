"""At full size, without weights: presets fit the card that they name, and no operation is wasted."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffalign.config import parse
from diffalign.forecast.dry_run import counted_config
from diffalign.forecast.fake_rewards import JUDGING
from diffalign.forecast.fit import parse_memory
from diffalign.forecast.fitter import SPARE, Fitter, brief
from diffalign.forecast.rehearsal import EVALUATE, SAMPLING, TRAINING, rehearse
from diffalign.models.meta_device import model_on_meta
from diffalign.structures import Conditioning
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import algorithm_names, find_algorithm
from tests.conftest import ROOT

# The cards on which each model has been rehearsed, in GB.
CARDS = {"sd15": (16, 24, 80), "sdxl": (16, 24, 80), "sd35_medium": (16, 24, 80), "flux1_dev": (24, 80)}
PRESETS = [(trainer, model) for trainer in algorithm_names() for model in CARDS]
TASKS = sorted(path for name in algorithm_names() for path in (ROOT / "configs" / name).glob("*.yaml"))
TASKS = [path for path in TASKS if path.stem not in CARDS and not path.stem.startswith("shapes")]
SMALL = {
    "rollout_batch_size": "4",
    "train_batch_size": "4",
    "gradient_checkpointing": "true",
    "offload": "[text_encoders]",
}
# One of each trainer; the last trains in bf16 without checkpointing.
FULL_SIZE = ["flow_grpo/sd35_medium", "diffusion_dpo/sdxl", "refl/sd35_medium", "flow_grpo/flux1_dev"]


def preset(name, monkeypatch, **more):
    """The algorithm and the configuration of a preset, without ``memory``, with some settings."""
    monkeypatch.chdir(ROOT)
    entry = find_algorithm(name.partition("/")[0])
    options = [text for key, value in more.items() for text in (f"--{key}", value)]
    config = parse(entry.config, ["--config", str(ROOT / f"configs/{name}.yaml"), *options])
    return entry, replace(config, memory=None)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "model"), PRESETS)
def test_a_preset_fits_its_cards_with_room_to_spare(trainer, model, monkeypatch):
    """Each card in turn, so that rehearsals are shared; what is chosen fits as a whole iteration."""
    entry, config = preset(f"{trainer}/{model}", monkeypatch)
    fitter = Fitter(entry, config)
    for card in CARDS[model]:
        found = fitter.fit(card * 10**9)
        assert found is not None, f"{card} GB"
        full = rehearse(entry, found.config)
        assert full.peak < card * 10**9 * (1 - SPARE), f"{card} GB: {full.peak / 1e9:.1f} GB in {full.peak_at}"
        assert not full.notes


@pytest.mark.slow
@pytest.mark.parametrize("path", TASKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_of_a_task_fits_80_gb(path, monkeypatch):
    entry, config = preset(f"{path.parent.name}/{path.stem}", monkeypatch)
    assert Fitter(entry, config).fit(80 * 10**9) is not None


@pytest.mark.slow
def test_a_small_preset_fits_with_its_reward_rehearsed(monkeypatch):
    """SD 1.5 of full size: PickScore's network scores beside the denoiser."""
    entry, config = preset("flow_grpo/sd15", monkeypatch, **SMALL)
    found = rehearse(entry, brief(config))
    assert found.peak < 16e9 * (1 - SPARE)
    assert found.flops[SAMPLING, JUDGING] > 2 * 160e9 * found.calls[SAMPLING, JUDGING]  # of its ViT-H, an image
    assert not found.notes


def forward_flops(config):
    """Of one evaluation of one image by the plain denoiser, as diffusers has it."""
    model = model_on_meta(config.model, resolution=config.resolution, max_sequence_length=config.max_sequence_length)
    assert type(model).__name__ == "SD3Model"
    width = model.raw_denoiser.config.joint_attention_dim
    tokens = model.max_sequence_length + model.pipeline.tokenizer_max_length
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        tensors = {"embeds": torch.zeros(1, tokens, width), "pooled": torch.zeros(1, 2048)}
        model.evaluate(torch.zeros(1, *model.latent_shape()), torch.zeros(1), Conditioning(tensors))
    return counter.get_total_flops()


@pytest.mark.slow
def test_what_flow_grpo_computes_is_within_3_percent_of_the_floor(monkeypatch):
    """No evaluation is wasted, each prompt is encoded once, and frozen weights get no gradient."""
    plain = {"gradient_checkpointing": "false", "rewards": "jpeg_compressibility", "eval_prompts": "null"}
    entry, config = preset("flow_grpo/sd35_medium", monkeypatch, **SMALL | plain)
    config = brief(config)
    found, one = rehearse(entry, config), forward_flops(config)
    work = entry.cost.iteration(counted_config(config), Share(), 0, 1)
    assert found.calls[SAMPLING, EVALUATE] == work.sampling
    assert found.flops[SAMPLING, EVALUATE] == pytest.approx(work.sampling * one, rel=0.03)
    assert found.calls[TRAINING, EVALUATE] == work.training + work.comparing
    assert found.flops[TRAINING, EVALUATE] == pytest.approx((work.training + work.comparing) * one, rel=0.03)
    assert found.calls[SAMPLING, "encode"] == config.num_groups + 1
    # Through activations only: as many operations as forward, half as many more in attention, and the adapter's.
    assert found.total(found.flops, TRAINING) < (work.comparing + 2.2 * work.training) * one * 1.03


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_evaluations_are_those_of_the_forecast(name, monkeypatch):
    entry, config = preset(name, monkeypatch, **SMALL)
    found, work = rehearse(entry, config), entry.cost.iteration(counted_config(config), Share(), 0, 1)
    assert found.calls.get((SAMPLING, EVALUATE), 0) == work.sampling
    assert found.calls[TRAINING, EVALUATE] == work.training + work.comparing


@pytest.mark.slow
def test_memory_chooses_savings_in_order_and_keeps_what_is_set(monkeypatch):
    model = ["--model", "stabilityai/stable-diffusion-3.5-medium", "--resolution", "512", "--mixed_precision", "bf16"]
    more = ["--train_prompts", "prompts.txt", "--rewards", "jpeg_compressibility", "--num_groups", "4"]
    monkeypatch.chdir(ROOT)
    entry = find_algorithm("flow_grpo")
    config = parse(entry.config, [*model, *more, "--group_size", "8", "--train_batch_size", "8"])
    fitter = Fitter(entry, config)
    small, large = fitter.fit(parse_memory("16GB")), fitter.fit(parse_memory("80GB"))
    assert small.config.gradient_checkpointing
    assert "text_encoders" in small.config.offload
    assert not large.config.gradient_checkpointing
    assert small.config.train_batch_size == large.config.train_batch_size == 8
    assert small.config.rollout_batch_size <= large.config.rollout_batch_size
    assert small.peak < 16e9 * (1 - SPARE)
    assert fitter.fit(parse_memory("1GB")) is None


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("22.5 GiB", int(22.5 * 2**30)), ("16", 16 * 10**9)])
def test_sizes_of_memory_are_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["lots", "0GB", "-3GB", "24MB"])
def test_a_wrong_size_is_refused(text):
    with pytest.raises(ValueError, match="write memory: 24GB, or memory: auto"):
        parse_memory(text)
