"""The forecast of a judge's training: parameters, memory and operations at full size, without weights."""

import math

import pytest
import torch
from pyarrow import parquet

from diffalign.cli import main
from diffalign.config import parse
from diffalign.forecast.dry_run import place_of
from diffalign.forecast.judge import blank_backbone, print_plan, rehearse_judge
from diffalign.forecast.rehearsal import ENCODE, SAMPLING, STEPPING, TRAINING, WEIGHTS
from diffalign.trainers.reward.algorithm import make_trainable
from diffalign.trainers.reward.config import RewardTrainerConfig
from diffalign.trainers.reward.trainer import new_network
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    parquet.write_table(parquet.read_table(ROOT / "assets/preferences/shapes.parquet").slice(0, 12), path)
    return str(path)


def preset(name, monkeypatch, **changes):
    monkeypatch.chdir(ROOT)
    options = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    config = parse(RewardTrainerConfig, ["--config", f"configs/reward/{name}.yaml", *options])
    config.validate()
    return config


def clip_tower(width, layers, inner):
    return layers * (4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width)


# Of ViT-H/14 beside a text tower of 24 layers; and of SigLIP's base size, whose towers end in a norm and a head.
VISION_H = clip_tower(1280, 32, 5120) + 1280 * (3 * 14 * 14) + 1280 * (257 + 1) + 4 * 1280
TEXT_H = clip_tower(1024, 24, 4096) + 1024 * (49408 + 77) + 2 * 1024
PICKSCORE = VISION_H + TEXT_H + 1280 * 1024 + 1024 * 1024 + 1
SIGLIP_TEXT = clip_tower(768, 12, 3072) + 768 * (32000 + 64) + 2 * 768 + 768 * 768 + 768
SIGLIP_POOL = 768 + 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 768
SIGLIP_VISION = clip_tower(768, 12, 3072) + 768 * (3 * 16 * 16 + 1) + 768 * 196 + 2 * 768 + SIGLIP_POOL
SIZES = {"pickscore": (PICKSCORE, 986_109_441), "siglip": (SIGLIP_TEXT + SIGLIP_VISION + 2, 203_155_970)}


@pytest.mark.parametrize("name", SIZES)
def test_backbones_have_the_published_number_of_parameters(name, monkeypatch):
    counted, published = SIZES[name]
    assert counted == published
    assert sum(p.numel() for p in blank_backbone(preset(name, monkeypatch)).parameters()) == published


def trained_bytes(config):
    with torch.device("meta"):
        network = make_trainable(new_network(blank_backbone(config), config, 0), config)
    every = sum(p.numel() for p in network.parameters())
    return 4 * every, 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_a_head_on_siglip_holds_weights_moments_and_little_else(monkeypatch):
    config = preset("siglip", monkeypatch)
    found = rehearse_judge(config, 0)
    weights, trained = trained_bytes(config)
    assert trained == 4 * (768 * 768 + 768 + 1)
    assert found.peaks[WEIGHTS, "other"] == pytest.approx(weights + 2 * trained, rel=0.01)
    assert found.peak < weights + 4e9
    # Two images and a prompt per pair, of which towers are run once.
    tower = 2 * 12 * (4 * 768**2 + 2 * 768 * 3072)
    floor = config.eval_batch_size * (2 * 196 + 64) * tower
    assert floor < found.flops[SAMPLING, ENCODE] < 1.25 * floor
    assert found.total(found.flops, TRAINING) < 1e-3 * floor


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "least", "most"), [
    ({}, 4.0, 40), ({"prototypes": 3, "rater_model": "pal_a"}, 4.0, 40),
    ({"train": "full", "lora": "{}"}, 4 * 3.9, 75),
], ids=["lora", "pal_a", "full"])  # fmt: skip
def test_pickscore_fits_80_gb_at_full_size(changes, least, most, monkeypatch):
    config = preset("pickscore", monkeypatch, **changes)
    found = rehearse_judge(config, 5 if config.prototypes > 1 else 0)
    assert least * 1e9 * 0.95 < found.peak < most * 1e9
    tower = 2 * 32 * (4 * 1280**2 + 2 * 1280 * 5120) * 257 * 2
    text = 2 * 24 * (4 * 1024**2 + 2 * 1024 * 4096) * 77
    floor = config.num_pairs * (tower + text)
    backward = {"lora": (1.9, 2.4), "full": (2.9, 3.3)}[config.train]  # in units of a forward pass
    assert backward[0] * floor < found.total(found.flops, TRAINING) < backward[1] * floor
    assert STEPPING in {phase for phase, _ in found.peaks}


@pytest.mark.parametrize(("name", "text"), [("siglip", "frozen towers"), ("shapes", "forward and backward")])
def test_a_dry_run_prints_memory_and_the_time_on_a_card(name, text, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    options = ["--train_data", pairs, "--output_dir", str(tmp_path / "judge")]
    assert main(["train", "reward", "--config", f"reward/{name}", *options, "--dry_run", "--card", "h100"]) == 0
    said = capsys.readouterr().out
    assert text in said
    assert "H100 SXM:" in said
    assert "in all" in said
    assert not (tmp_path / "judge").exists()
    assert math.isfinite(float(said.partition("peak: ")[2].split()[0]))


def test_a_dry_run_says_what_it_cannot_forecast(pairs, monkeypatch, capsys):
    config = preset("siglip", monkeypatch, train_data=f"[{pairs}]", backbone="someone/model")
    assert print_plan(config, place_of()) == 0
    assert "not forecast: the package has no configuration of someone/model" in capsys.readouterr().out
