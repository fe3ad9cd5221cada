"""The scripts that measure: what they would run is valid, and what they report is right."""

import csv
import importlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image
from yaml import safe_load

from diffalign import DiffusionDPOConfig, FlowGRPOConfig
from diffalign.config import parse
from diffalign.losses.registry import PREFERENCE_LOSSES, get_loss
from diffalign.shapes import Object, render
from diffalign.shapes.captions import is_novel
from diffalign.structures import Prompt

ROOT = Path(__file__).parents[2]


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


def test_seconds_are_those_of_all_updates_of_an_iteration_and_checkpoints_have_their_share(tmp_path, recipes):
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


@dataclass(frozen=True)
class Small:
    """A trial that needs no training."""

    name: str
    code: str

    def folder(self, root):
        return root / self.name

    def command(self, root):
        self.folder(root).mkdir(exist_ok=True)
        return [sys.executable, "-c", self.code, str(self.folder(root))]

    def row(self, root):
        return {"gain": 0.0}


def test_trials_run_once_beside_each_other_and_a_failed_one_is_named(recipes, tmp_path):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'README.md').open('a').write('x')"
    small = [Small(name, write) for name in "abc"]
    recipes.trials.work(small, tmp_path, 2)
    recipes.trials.work(small, tmp_path, 2)
    assert [(tmp_path / name / "README.md").read_text() for name in "abc"] == ["x"] * 3
    assert 0 < recipes.trials.peak_memory(tmp_path / "a") < 1
    assert recipes.trials.peak_memory(tmp_path) is None
    with pytest.raises(RuntimeError, match=r"d\.log \(exit 3\)"):
        recipes.trials.work([Small("d", "raise SystemExit(3)")], tmp_path, 1)
    assert not (tmp_path / "d/cost.json").exists()


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


@pytest.fixture
def losses(monkeypatch, tmp_path):
    module = importlib.import_module("scripts.studies.compare_losses")
    for name in ("CSV", "TABLE", "PICTURE"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    return module


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
    assert seen == set(PREFERENCE_LOSSES)


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


@pytest.mark.parametrize("name", ["flow_grpo/shapes", "flow_grpo/shapes_long", "refl/shapes_draft_k"])
def test_the_seeds_csv_is_of_the_shipped_config(name):
    config = safe_load((ROOT / f"configs/{name}.yaml").read_text())
    rows = list(csv.DictReader((ROOT / f"assets/results/{Path(name).name}_seeds.csv").open()))
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


def test_wrong_images_are_sorted_by_what_is_wrong(monkeypatch, tmp_path):
    fails = importlib.import_module("scripts.studies.what_fails")
    drawn = {
        "right": [("circle", "red"), ("square", "blue")],
        "other colour or place": [("circle", "red"), ("square", "green")],
        "other shapes": [("circle", "red"), ("triangle", "blue")],
        "too few": [("circle", "red")],
        "too many": [("circle", "red"), ("square", "blue"), ("circle", "green")],
    }
    spec = {"tag": "color_attr", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    spec["include"].append({"class": "square", "count": 1, "color": "blue"})
    folder = tmp_path / "images/model"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, things in enumerate(drawn.values()):
        scene = [Object(s, c, 12.0 + 20 * j, 12.0 + 18 * j, 8.0) for j, (s, c) in enumerate(things)]
        to_pil_image(render([scene])[0]).save(folder / f"images/00000-{i}.png")
        lines.append(json.dumps({"prompt": 0, "sample": i, "rewards": {}}) + "\n")
    blot = torch.full((3, 64, 64), 0.0)
    blot[0, 10:14, 5:60] = 1.0
    to_pil_image(blot).save(folder / f"images/00000-{len(lines)}.png")
    lines.append(json.dumps({"prompt": 0, "sample": len(lines), "rewards": {}}) + "\n")
    (folder / "scores-0.jsonl").write_text("".join(lines))
    found = fails.reasons(folder, [Prompt("x", spec)])
    assert found == {("color_attr", name): 1 for name in (*drawn, "no clear shape")}
    monkeypatch.setattr(fails, "TAGS", ("color_attr",))
    fails.draw({"model": found}, tmp_path / "fails.png")
    assert (tmp_path / "fails.png").stat().st_size > 3000


def test_the_bench_adds_up(tmp_path):
    tiny = ["--num_groups", "2", "--group_size", "4", "--eval_prompts", "null", "--repeats", "1"]
    tiny += ["--plan.window_range", "[2, 4]"]
    command = [sys.executable, "scripts/bench/flow_grpo.py", *tiny, "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["seconds_per_iteration"] == pytest.approx(sum(found["seconds"].values()))
    assert found["evaluations_per_image"]["sampling"] == pytest.approx(6 + 2 / 4)
    assert found["ratio"] > 0


def test_the_bench_of_pairs_adds_up(tmp_path):
    tiny = ["--num_pairs", "4", "--train_batch_size", "2", "--eval_prompts", "null", "--data.scan", "2"]
    command = [sys.executable, "scripts/bench/dpo.py", *tiny, "--repeats", "1", "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["pairs_per_second"] == pytest.approx(4 / sum(found["seconds"].values()))
    assert found["bare_pairs_per_second"] == pytest.approx(4 / sum(found["bare_seconds"].values()))
    assert set(found["bare_seconds"]) == {"forward and backward", "reference forward", "optimizer"}
    assert found["ratio"] == pytest.approx(found["bare_pairs_per_second"] / found["pairs_per_second"])


def test_rewards_are_timed_against_their_networks(tmp_path):
    tiny = ["--images", "2", "--side", "32", "--layers", "1", "--width", "64", "--repeats", "1"]
    command = [sys.executable, "scripts/bench/rewards.py", *tiny, "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())["rewards"]
    assert list(found) == ["pickscore", "aesthetic", "hpsv2.1", "vqascore"]
    assert all(figures["ratio"] > 0 for figures in found.values())


def test_a_wrong_caption_is_wrong_in_one_word_and_names_nothing_held_out(monkeypatch):
    build = importlib.import_module("scripts.build.shapes_training")
    rng = random.Random(0)
    prompts = [build.caption(rng, tag, plain=1.0) for tag in build.TAGS for _ in range(40)]
    for prompt in prompts:
        for other in build.neighbours(prompt.metadata):
            assert not is_novel(other)
            words, others = (text.replace(" of", "").split() for text in (prompt.text, build.phrase(other)))
            assert sum(a != b for a, b in zip(words, others, strict=True)) == 1
    wrong = [build.wording(prompt.metadata, 1.0, rng) for prompt in prompts]
    assert not any(text.endswith(prompt.text) for text, prompt in zip(wrong, prompts, strict=True) if text)
    right = [build.wording(prompt.metadata, 0.0, rng) for prompt in prompts]
    assert all(text.endswith(prompt.text) for text, prompt in zip(right, prompts, strict=True) if text)
    assert 0.02 < sum(not text for text in right) / len(right) < 0.2
