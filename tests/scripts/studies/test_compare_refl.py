"""The comparison of ReFL recipes: every command is valid, and held-out rewards choose the learning rate."""

import importlib
import json
from pathlib import Path

import pytest

from diffalign import ReFLConfig
from diffalign.config import parse
from diffalign.diffusion.reward_gradient_presets import PRESETS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def compare(monkeypatch):
    return importlib.import_module("scripts.studies.compare_refl")


def test_every_preset_is_compared_on_as_many_images(compare, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = set()
    runs = [compare.Run(name, judge, 1.0, 0) for name in compare.VARIANTS for judge in compare.JUDGES]
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    for run in runs:
        args = parse(ReFLConfig, run.command(tmp_path)[2:])
        args.validate()
        assert args.num_groups * args.group_size == 64
        trained = "aesthetic" if run.variant == "drtune, aesthetic" else run.judge
        assert list(args.rewards) == [trained]
        assert set(args.held_out) == set(compare.JUDGES) - {trained}
        found.add(args.recipe.preset)
    assert found == set(PRESETS)


def test_the_best_learning_rate_is_chosen_by_held_out_rewards(compare, tmp_path):
    for factor, gain in ((0.5, 0.1), (1.0, 0.3), (2.0, -0.2)):
        for seed in (0, 1) if factor == 1.0 else (0,):
            run = compare.Run("draft_1", "pickscore", factor, seed)
            folder = run.folder(tmp_path)
            folder.mkdir()
            (folder / "config.yaml").write_text("num_groups: 64\ngroup_size: 1\n")
            (folder / "README.md").write_text("done")
            (folder / "cost.json").write_text('{"peak_memory_gib": 0.5}')
            rows = [{"step": 1, "time/collect": 60.0, "time/update": 30.0}]
            for step, change in ((0, 0.0), (150, gain)):
                figures = {"accuracy": 0.4 + change / 2, "pickscore": 8 + 30 * factor * (step > 0), "diversity": 0.2}
                figures |= {"hpsv2.1": 0.5 + change, "vqascore": 0.4, "reference_distance": 0.1 * (step > 0)}
                figures |= {"sharpness/pickscore": 1.0 + (step > 0) * factor, "alarm": float(change < 0)}
                rows.insert(step, {"step": step, **{f"eval/{name}": value for name, value in figures.items()}})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.best_factor(tmp_path, "draft_1", "pickscore", 0, (0.5, 1.0, 2.0)) == 1.0
    row = compare.Run("draft_1", "pickscore", 1.0, 0).row(tmp_path)
    assert (row["images"], row["minutes"], row["alarms"], row["sharpness_ratio"]) == (9600, 1.5, 0, 2.0)
    assert row["accuracy/tuned"] == pytest.approx(0.55)
    assert row["peak_memory_gib"] == 0.5
    compare.CSV, compare.TABLE, compare.PICTURE = (tmp_path / f"refl.{kind}" for kind in ("csv", "md", "png"))
    compare.write(tmp_path, [0, 1], [0.5, 1.0, 2.0], "pickscore")
    assert len(compare.CSV.read_text().splitlines()) == 1 + 4
    assert "| draft_1 | 40.0 → 55.0 ± 0.0 | 15.0 ± 0.0 | 8.00 → 38.00 | 0.500 → 0.800 |" in compare.TABLE.read_text()
    assert compare.PICTURE.stat().st_size > 5000
