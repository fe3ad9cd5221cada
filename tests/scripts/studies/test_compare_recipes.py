"""The comparison of recipes: every command is valid, and learning rates are tuned."""

import importlib
import json
from pathlib import Path

import pytest

from diffalign import FlowGRPOConfig
from diffalign.config import parse

ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipes(monkeypatch):
    return importlib.import_module("scripts.studies.compare_recipes")


def test_every_recipe_is_valid_and_trains_on_as_many_images(recipes, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [recipes.Run(axis, name, 1.0, 0) for axis, names in recipes.AXES.items() for name in names]
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    for run in runs:
        args = parse(FlowGRPOConfig, run.command(tmp_path)[2:])
        args.validate()
        assert args.num_groups * args.group_size * args.max_train_steps == 256 * recipes.STEPS
        assert args.output_dir == run.folder(tmp_path)


def finish(run, root, gain):
    """What a run leaves behind that has trained."""
    folder = run.folder(root)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"seed: {run.seed}\nnum_groups: 16\ngroup_size: 16\n")
    (folder / "README.md").write_text("done")
    rows = [
        {"step": 0, "eval/accuracy": 0.4, "eval/shapes": 0.5, "eval/diversity": 0.2},
        {"step": 1, "time/collect": 1.0, "time/update": 1.0},
        {"step": 24, "eval/accuracy": 0.4 + gain, "eval/shapes": 0.5, "eval/diversity": 0.2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("gains", "tried", "best"),
    [
        ({0.25: 0.1, 0.5: 0.2, 1.0: 0.1}, [0.5, 1.0, 0.25], 0.5),
        ({0.5: 0.2, 1.0: 0.3, 2.0: 0.4}, [0.5, 1.0, 2.0], 2.0),
    ],
)
def test_a_learning_rate_is_tuned_on_the_first_seed_towards_where_it_gains(
    gains, tried, best, recipes, tmp_path, monkeypatch
):
    done = []

    def work(runs, root, jobs):
        for run in runs:
            if not recipes.trials.done(run, root):
                done.append((run.variant, run.factor, run.seed))
                finish(run, root, gains[run.factor])

    monkeypatch.setattr(recipes.trials, "work", work)
    recipes.compare("KL", [7, 8], tmp_path, 1)
    assert done == [("0.03", factor, 7) for factor in tried] + [("0.03", best, 8)]
    recipes.compare("KL", [7, 8], tmp_path, 1)
    assert len(done) == 4
    row = recipes.Run("KL", "0.03", best, 8).row(tmp_path)
    assert row["gain"] == pytest.approx(gains[best])
    assert row["images"] == 256 * 24


def test_the_recipes_are_drawn(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "PICTURE", tmp_path / "recipes.png")
    rows = [
        {"axis": axis, "variant": name, "factor": factor, "seed": seed, "gain": 0.1 * seed}
        for axis, name in (("", "quickstart"), ("noise", "0.35"))
        for factor, seed in ((0.5, 0), (1.0, 0), (1.0, 1))
    ]
    assert [row["factor"] for row in recipes.tuned(rows)] == [1.0] * 4
    recipes.draw(rows)
    assert (tmp_path / "recipes.png").stat().st_size > 5000
