"""The scripts that measure ReFL: what they would run is valid, and what they report adds up."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign import ReFLConfig
from diffalign.config import parse
from diffalign.diffusion.reward_gradient_presets import PRESETS

ROOT = Path(__file__).parents[2]


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


TINY = ["--num_groups", "2", "--rollout_batch_size", "2", "--train_batch_size", "2", "--eval_prompts", "null"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.chdir(ROOT)
    return importlib.import_module("scripts.bench.refl")


def test_the_bench_adds_up(bench):
    step = bench.timed(ROOT / "configs/refl/shapes.yaml", TINY, 1)
    assert step["ratio"] == pytest.approx(step["seconds_per_step"] / sum(step["bare_seconds"].values()))
    assert step["steps_per_second"] == pytest.approx(1 / step["seconds_per_step"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(), reason="Linux's figures")
def test_memory_that_was_needed_before_does_not_hide_what_a_step_needs(bench):
    earlier = torch.ones(2**26)  # 256 MiB
    del earlier
    before = bench.forget_peak()
    step = torch.ones(2**25)
    del step
    assert bench.peak_since() - before == pytest.approx(2**-3, rel=0.05)


@pytest.mark.slow
def test_the_bench_measures_each_saving_in_a_process_of_its_own(tmp_path):
    sizes = ["--num_groups", "16", "--rollout_batch_size", "16", "--train_batch_size", "16"]  # of two nothing is saved
    command = [sys.executable, "scripts/bench/refl.py", *TINY, *sizes, "--repeats", "1"]
    command += ["--savings", "none", "train_batch_size 1", "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())["memory"]["own"]
    assert list(found) == ["none", "train_batch_size 1"]
    assert all(one["peak_gib"] > one["step_gib"] > 0 for one in found.values())
    assert found["train_batch_size 1"]["step_gib"] < found["none"]["step_gib"]
