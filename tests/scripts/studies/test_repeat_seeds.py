"""The table over seeds: seconds, checkpoint share, means and the shipped CSV files."""

import csv
import importlib
import json
import shutil
from pathlib import Path

import pytest
from yaml import safe_load

ROOT = Path(__file__).parents[3]


def test_seconds_are_those_of_all_updates_of_an_iteration_and_checkpoints_have_their_share(tmp_path):
    seeds = importlib.import_module("scripts.studies.repeat_seeds")
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    rows = [
        {"step": 0, "eval/accuracy": 0.4},
        {"step": 1, "time/collect": 5.0, "time/update": 1.0},
        {"step": 2, "time/update": 2.0},
        {"step": 2, "time/save": 0.25},
        {"step": 3, "time/collect": 6.0, "time/update": 1.5},
        {"step": 4, "time/update": 4.0},
        {"step": 4, "eval/accuracy": 0.5},
        {"step": 4, "time/save": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["training_seconds"] for row in seeds.evaluations(tmp_path)] == [0, 19.5]
    assert seeds.checkpoint_share(tmp_path) == pytest.approx(0.5 / 20)


@pytest.mark.parametrize("name", ["flow_grpo/shapes", "flow_grpo/shapes_long", "refl/shapes_draft_k"])
def test_the_seeds_csv_is_of_the_shipped_config(name):
    config = safe_load((ROOT / f"configs/{name}.yaml").read_text())
    rows = list(csv.DictReader((ROOT / f"assets/results/{name.replace('/', '_')}_seeds.csv").open()))
    steps = range(0, config["max_train_steps"] + 1, config["eval_steps"])
    assert [(row["seed"], int(row["step"])) for row in rows] == [(seed, step) for seed in "012" for step in steps]


def test_seeds_are_summed_up_and_drawn(monkeypatch, tmp_path):
    seeds = importlib.import_module("scripts.studies.repeat_seeds")
    for seed, gain in ((0, 0.1), (1, 0.3)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"seed: {seed}")
        rows = [
            {"step": 1, "time/collect": 1.0, "time/update": 0.5},
            {"step": 2, "time/collect": 1.0, "time/update": 1},
        ]
        figures = [{f"eval/{name}": value for name in seeds.FIGURES} for value in (0.4, 0.4, 0.4 + gain)]
        rows = [{"step": 0, **figures[0]}, rows[0], {"step": 1, **figures[1]}, rows[1], {"step": 2, **figures[2]}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [seeds.evaluations(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    assert [row["training_seconds"] for row in runs[0]] == [0, 1.5, 3.5]
    table = seeds.table(runs)
    assert "| accuracy/position | 40.0 ± 0.0 | 60.0 ± 14.1 |" in table
    assert "gain 20.0 ± 14.1 points" in table
    seeds.draw(runs, tmp_path / "seeds.png")
    assert (tmp_path / "seeds.png").stat().st_size > 5000
    assert [seeds.check(tmp_path / f"seed-{seed}") for seed in (0, 1)] == [1, 0]


def test_test_prompts_are_evaluated_once_with_base_and_last_weights(run_folder, tmp_path, monkeypatch):
    """Rows have the columns of validation, from the figures of ``diffalign eval``."""
    seeds = importlib.import_module("scripts.studies.repeat_seeds")
    folder = tmp_path / "seed-0"
    shutil.copytree(run_folder, folder)
    prompts = tmp_path / "prompts.jsonl"
    lines = (ROOT / "assets/prompts/shapes_test.jsonl").read_text().splitlines()
    prompts.write_text("\n".join(lines[::105]))

    base, tuned = seeds.tested(folder, prompts)
    found = json.loads((folder / "test/results.json").read_text())["models"]
    assert (base["weights"], tuned["weights"]) == ("base", "tuned")
    assert tuned["shapes"] == found["tuned"]["rewards"]["shapes"]["mean"] != base["shapes"]
    tag, task = next(iter(found["base"]["tasks"].items()))
    assert base[f"accuracy/{tag}"] == task["mean"]
    monkeypatch.setattr(seeds, "evaluate", None)
    assert seeds.tested(folder, prompts) == [base, tuned]
    assert "training" not in seeds.table([[base, tuned]])


@pytest.mark.parametrize("name", ["forward_rl/shapes"])
def test_the_test_csv_has_every_seed_of_a_shipped_config(name):
    assert (ROOT / f"configs/{name}.yaml").is_file()
    rows = list(csv.DictReader((ROOT / f"assets/results/{name.replace('/', '_')}_test.csv").open()))
    assert [(row["seed"], row["weights"]) for row in rows] == [(s, w) for s in "012" for w in ("base", "tuned")]
