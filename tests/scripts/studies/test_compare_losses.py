"""The comparison of losses: every variant is valid, and the table reports the best learning rate."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign import DiffusionDPOConfig
from diffalign.config import parse
from diffalign.losses.registry import PREFERENCE_LOSSES, get_loss

ROOT = Path(__file__).parents[3]


@pytest.fixture
def losses(monkeypatch, tmp_path):
    module = importlib.import_module("scripts.studies.compare_losses")
    for name in ("CSV", "TABLE", "PICTURE"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    return module


@pytest.mark.slow
def test_every_loss_is_compared_and_every_variant_is_valid(losses, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [losses.Run(name, 1.0, 0) for name in losses.VARIANTS]
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    seen = set()
    for run in runs:
        args = parse(DiffusionDPOConfig, run.command(tmp_path)[2:])
        args.validate()
        assert args.output_dir == run.folder(tmp_path)
        seen.add(args.loss)
        if not args.online:
            images = args.num_pairs * (2 if get_loss(args.loss).paired else 1)
            assert images == (64 if args.loss == "sft" else 128)
    assert seen == {name for name, loss in PREFERENCE_LOSSES.items() if not loss.steps}, "all of images"


def pretended_run(folder, seed, gain):
    """What a finished run leaves, of 6 prompts with 2 images each: a share ``gain`` of the images became better."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    (folder / "README.md").write_text("done")
    base = torch.full((12,), 0.5)
    tuned = base + (torch.arange(12) < 12 * gain) * 0.25
    for name, scores in (("base", base), ("tuned", tuned)):
        save_file({"score/shapes": scores, "prompt": torch.arange(12) // 2}, folder / f"samples/{name}.safetensors")
    rows = [
        {"step": 0, "eval/accuracy": 0.4, "eval/diversity": 0.2},
        {"step": 1, "time/collect": 20.0, "time/update": 40.0, "winner_gain": -0.3},
        {"step": 2, "time/collect": 20.0, "time/update": 40.0, "winner_gain": -0.1},
        {"step": 2, "eval/accuracy": 0.4 + gain, "eval/diversity": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_losses_are_tabled_and_drawn_at_their_best_learning_rate(losses, tmp_path):
    gains = {("dpo", 0.3): (0.0,), ("dpo", 1.0): (0.5, 0.25), ("ipo", 0.3): (0.25, 0.0), ("ipo", 1.0): (0.0,)}
    for (name, factor), seeds in gains.items():
        for seed, gain in enumerate(seeds):
            pretended_run(losses.Run(name, factor, seed).folder(tmp_path), seed, gain)
    assert losses.best_factor(tmp_path, "dpo", 0, (0.3, 1.0)) == 1.0
    assert losses.best_factor(tmp_path, "ipo", 0, (0.3, 1.0)) == 0.3
    losses.write(tmp_path, [losses.Run(n, f, s) for n in losses.VARIANTS for f in (0.3, 1.0) for s in (0, 1)])
    rows = list(csv.DictReader(losses.CSV.open()))
    assert [(r["variant"], r["factor"], r["seed"]) for r in rows] == [
        ("dpo", "0.3", "0"),
        ("dpo", "1.0", "0"),
        ("dpo", "1.0", "1"),
        ("ipo", "0.3", "0"),
        ("ipo", "0.3", "1"),
        ("ipo", "1.0", "0"),
    ]
    # Of 12 images 6 won and 6 tied: 3 prompts of 6 have the rate 1, the others one half.
    assert float(rows[1]["win_rate"]) == 0.75
    # Prompts are drawn, not images: of 6 draws, 1 at least is of the better half in all but 1.6 % of the resamples.
    assert float(rows[1]["win_low"]) == pytest.approx(7 / 12)
    assert float(rows[1]["win_high"]) == pytest.approx(11 / 12)
    assert float(rows[1]["minutes"]) == 2.0
    _, _, dpo, ipo = losses.TABLE.read_text().strip().split("\n")
    # Over both seeds 6 and 3 of 12 images won, the others tied.
    assert dpo.startswith("| dpo | 77.5 ± 17.7 | 37.5 ± 17.7 | 68.8 [")
    assert ipo.endswith("| 0.100 | -0.200 | 2.0 | 0.0003 | `shapes.yaml`, `loss: ipo`, `beta: 3.0` |")
    assert losses.PICTURE.stat().st_size > 5000
