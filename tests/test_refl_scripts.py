"""The scripts that measure ReFL: what they would run is valid, and what they report adds up."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign import ReFLConfig
from diffalign.config import parse
from diffalign.diffusion.recipe import PRESETS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("compare_refl")


def test_every_preset_is_compared_on_as_many_images(compare, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = set()
    runs = [compare.Run(name, judge, 1.0, 0) for name in compare.VARIANTS for judge in compare.JUDGES]
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    for run in runs:
        args = parse(ReFLConfig, run.command(tmp_path)[2:])
        args.validate()
        assert args.num_groups * args.group_size == 64
        assert list(args.rewards) == [run.judge]
        assert set(args.held_out) == set(compare.JUDGES) - {run.judge}
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
    assert compare.best_factor(tmp_path, "draft_1", "pickscore", 0) == 1.0
    row = compare.Run("draft_1", "pickscore", 1.0, 0).row(tmp_path)
    assert (row["images"], row["minutes"], row["alarms"], row["sharpness_ratio"]) == (9600, 1.5, 0, 2.0)
    assert row["accuracy/tuned"] == pytest.approx(0.55)
    assert row["peak_memory_gib"] == 0.5
    compare.CSV, compare.PICTURE = tmp_path / "refl.csv", tmp_path / "refl.png"
    compare.write(tmp_path, [0, 1], "pickscore")
    assert len(compare.CSV.read_text().splitlines()) == 1 + 4
    assert compare.PICTURE.stat().st_size > 5000


def test_the_bench_adds_up(tmp_path):
    tiny = ["--num_groups", "4", "--rollout_batch_size", "2", "--train_batch_size", "2", "--eval_prompts", "null"]
    tiny += ["--repeats", "1", "--savings", "none", "decode_slice 1"]
    command = [sys.executable, "scripts/bench_refl.py", *tiny, "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    step = found["steps"]["own"]
    assert step["ratio"] > 0
    assert step["steps_per_second"] == pytest.approx(1 / step["seconds_per_step"])
    assert list(found["memory"]["own"]) == ["none", "decode_slice 1"]
    assert all(one["peak_gib"] > one["step_gib"] >= 0 for one in found["memory"]["own"].values())
