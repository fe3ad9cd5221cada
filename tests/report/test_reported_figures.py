"""Card, grid, page, curves, eval and score say what a recomputation from the images says, whatever the names."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig
from diffalign.cli import main
from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan import PlanConfig
from diffalign.report.grids import OverallMeans, compare_grid
from diffalign.rewards.base import REWARDS, FunctionReward, Registered
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PIPELINE, PROMPTS

pytestmark = pytest.mark.filterwarnings("ignore::diffalign.rollout.scoring.RewardWarning")
PER_PROMPT = 2
WEIGHTS = {"zebra": 1.0, "ape": 0.25}


def zebra(pixels, prompt):
    """Mean of red: of an image (H, W, 3) in [0, 1]."""
    return pixels[..., 0].mean()


def ape(pixels, prompt):
    """Bright or not, by blue; nothing to say of prompts with a "two" in them."""
    return math.nan if "two" in prompt else float(pixels[..., 2].mean() > 0.8)


def reward(function):
    def call(images, prompts, metadata):
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([function(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)])

    return call


@dataclass
class Reported:
    """A run whose rewards are named in this order, what its pictures say, and an evaluation of the same settings."""

    order: tuple[str, ...]
    folder: Path
    evaluated: Path
    drawn: list[str]
    prompts: list
    plotted: dict

    @property
    def primary(self):
        return self.order[0]

    def scores(self, model, name):
        """(prompts, images) of a reward, from the images on the disk."""
        judge = {"zebra": zebra, "ape": ape}[name]
        return np.array(
            [
                [judge(self.pixels(model, i, k), prompt.text) for k in range(PER_PROMPT)]
                for i, prompt in enumerate(self.prompts)
            ]
        )

    def pixels(self, model, i, k):
        file = self.evaluated / f"images/{model}/images/{i:05d}-{k}.png"
        return np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) / 255


def collect_texts(patch, drawn):
    """Every text that is written into a picture from now on goes to ``drawn`` too."""
    text = ImageDraw.ImageDraw.text
    write = lambda self, xy, t, *a, **k: drawn.append(t) or text(self, xy, t, *a, **k)  # noqa: E731
    patch.setattr(ImageDraw.ImageDraw, "text", write)


@pytest.fixture(
    scope="module", params=[("zebra", "ape"), pytest.param(("ape", "zebra"), marks=pytest.mark.slow)], ids="-".join
)
def reported(request, eval_prompts, tmp_path_factory):
    order, drawn = request.param, []
    folder = tmp_path_factory.mktemp("reported") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("zebra", zebra), ("ape", ape)):
            made = Registered(lambda name, function=function: FunctionReward(name, reward(function)), {"name": name})
            patch.setitem(REWARDS, name, made)
        collect_texts(patch, drawn)
        args = FlowGRPOConfig(
            model=str(PIPELINE), max_sequence_length=16, train_prompts=PROMPTS / "shapes_train.jsonl",
            eval_prompts=eval_prompts, output_dir=folder, rewards={name: WEIGHTS[name] for name in order},
            lora=LoraConfig(rank=4), plan=PlanConfig(preset="first_steps", num_steps=2, window_size=1), num_groups=1,
            group_size=4, rollout_batch_size=8, train_batch_size=8, max_train_steps=1, learning_rate=1.0,
            eval_images_per_prompt=PER_PROMPT, ema_decay=0.5 if order[0] == "ape" else 0.0, max_unscored=1.0,
        )  # fmt: skip
        FlowGRPOTrainer(args=args).train()
        AcceleratorState._reset_state(reset_partial_state=True)
        drawn_by_run = list(drawn)
        evaluated = folder.parent / "eval"
        assert main(["eval", str(folder), "--output_dir", str(evaluated), "--images_per_prompt", str(PER_PROMPT)]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        yield Reported(order, folder, evaluated, drawn_by_run, load_prompts(eval_prompts), {})


def table(text):
    """Label -> cells of the Markdown table in a text."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if set(row[0]) != {"-"}}


def number(cell):
    return float(cell.split()[0])


CLOSE = {"abs": 3e-3}  # images on the disk have 8 bits, and tables three digits


def test_the_model_learned_something_that_a_swap_of_names_would_show(reported):
    differences = [abs(np.nanmean(reported.scores("run", name)) - np.nanmean(reported.scores("base", name)))
                   for name in reported.order]  # fmt: skip
    assert max(differences) > 0.02
    base = {name: np.nanmean(reported.scores("base", name)) for name in reported.order}
    assert abs(base["zebra"] - base["ape"]) > 0.05


@pytest.mark.parametrize("where", ["card", "eval"])
def test_tables_hold_the_means_of_all_images(reported, where):
    file = {"card": reported.folder / "README.md", "eval": reported.evaluated / "results.md"}[where]
    text = file.read_text()
    rows = table(text)
    models = {"card": ("base", "tuned"), "eval": ("base", "run")}[where]
    assert rows[""] == list(models)
    for name in reported.order:
        found = {"base": reported.scores("base", name), "tuned": reported.scores("run", name)}
        for cell, scores in zip(rows[name], found.values(), strict=True):
            assert number(cell) == pytest.approx(np.nanmean(scores), **CLOSE)
            missing = int(np.isnan(scores).sum())
            assert (f"({scores.size - missing} of {scores.size} scored)" in cell) == (missing > 0)
    assert f"all {len(reported.prompts) * PER_PROMPT} images ({len(reported.prompts)} prompts" in text
    assert f"{PER_PROMPT} images each" in text


@pytest.mark.parametrize("where", ["card", "eval"])
def test_tasks_are_of_the_primary_reward_in_every_column(reported, where):
    file = {"card": reported.folder / "README.md", "eval": reported.evaluated / "results.md"}[where]
    rows = table(file.read_text())
    tags = [prompt.metadata["tag"] for prompt in reported.prompts]
    for tag in dict.fromkeys(tags):
        own = [i for i, other in enumerate(tags) if other == tag]
        wanted = [reported.scores(model, reported.primary)[own] for model in ("base", "run")]
        if np.isnan(wanted[0]).all():
            assert f"{reported.primary}: {tag}" not in rows
            continue
        cells = rows[f"{reported.primary}: {tag}"]
        assert [number(cell) for cell in cells] == pytest.approx([np.nanmean(scores) for scores in wanted], **CLOSE)
    assert not any(label.startswith(f"{reported.order[1]}: ") and "wins" not in label for label in rows)


@pytest.mark.parametrize("where", ["card", "eval"])
def test_wins_and_intervals_are_those_of_the_images(reported, where):
    file = {"card": reported.folder / "README.md", "eval": reported.evaluated / "results.md"}[where]
    rows = table(file.read_text())
    for name in reported.order:
        base, tuned = reported.scores("base", name), reported.scores("run", name)
        both = np.isfinite(base) & np.isfinite(tuned)
        sign = np.sign(tuned - base)[both]
        counts = [(sign > 0).sum(), (sign == 0).sum(), (sign < 0).sum()]
        cell = rows[f"{name}: wins over base"][1]
        assert cell.endswith(f"({counts[0]} / {counts[1]} / {counts[2]})"), name
        assert number(cell) == pytest.approx((counts[0] + counts[1] / 2) / sum(counts), **CLOSE)
        # An own bootstrap over prompts: half the width of the interval of the mean.
        rng = np.random.default_rng(1)
        kept = tuned[~np.isnan(tuned).all(1)]
        means = [np.nanmean(kept[rng.integers(0, len(kept), len(kept))]) for _ in range(4000)]
        half = (np.quantile(means, 0.975) - np.quantile(means, 0.025)) / 2
        assert float(rows[name][1].split()[2]) == pytest.approx(half, abs=0.02)


def test_the_log_says_the_same(reported):
    rows = [row for row in MetricsLog.read(reported.folder / "metrics.jsonl") if "eval/accuracy" in row]
    for row, model in ((rows[0], "base"), (rows[-1], "run")):
        assert row["eval/accuracy"] == pytest.approx(np.nanmean(reported.scores(model, reported.primary)), **CLOSE)
        for name in reported.order:
            assert row[f"eval/{name}"] == pytest.approx(np.nanmean(reported.scores(model, name)), **CLOSE)
    train = [row for row in MetricsLog.read(reported.folder / "metrics.jsonl") if "reward/mean" in row]
    if reported.order[0] == "zebra":  # no image of these prompts may be without a score, for the sum to be this
        for row in train:
            if row["unscored"] == 0:
                summed = sum(WEIGHTS[name] * row[f"reward/{name}"] for name in reported.order)
                assert row["reward/mean"] == pytest.approx(summed, abs=1e-5)


def test_the_results_file_says_the_same(reported):
    found = json.loads((reported.evaluated / "results.json").read_text())
    assert found["settings"]["number_of_prompts"] == len(reported.prompts)
    for model, own in found["models"].items():
        assert own["primary"] == reported.primary
        assert own["images"] == len(reported.prompts) * PER_PROMPT
        for name in reported.order:
            scores = reported.scores(model, name)
            assert own["rewards"][name]["mean"] == pytest.approx(np.nanmean(scores), **CLOSE)
            assert own["scored"][name] == np.isfinite(scores).sum()
        distances = [np.sqrt(((reported.pixels(model, i, 0) - reported.pixels(model, i, 1)) ** 2).mean())
                     for i in range(len(reported.prompts))]  # fmt: skip
        assert own["diversity"]["pixels"] == pytest.approx(np.mean(distances), **CLOSE)


def test_the_runs_picture_says_which_set_each_mean_is_over(reported):
    shown = len(reported.prompts)
    for count in (shown, shown * PER_PROMPT):
        assert f"mean of {count}: {reported.primary}" in reported.drawn
    note = (
        f"Means over the {shown} images shown, 1 per prompt, and over all {shown * PER_PROMPT} images, {PER_PROMPT} per"
    )
    assert note in " ".join(reported.drawn)
    figures = [text for text in reported.drawn if re.fullmatch(r"-?[\d.]+(e-?\d+)?( \(\d+ scored\))?", text)]
    for model in ("base", "run"):
        scores = reported.scores(model, reported.primary)
        for wanted in (np.nanmean(scores[:, 0]), np.nanmean(scores)):
            assert any(abs(number(text) - wanted) < 3e-3 for text in figures), (model, wanted, figures)


def test_every_checked_image_of_the_samples_is_the_evaluated_one(reported):
    from safetensors.torch import load_file

    for file, model in (("base", "base"), ("tuned", "run")):
        kept = load_file(reported.folder / f"samples/{file}.safetensors")
        for i, image in enumerate(kept["images"]):
            difference = np.abs(image.permute(1, 2, 0).numpy() - reported.pixels(model, i, 0))
            assert difference.max() < 1 / 255 + 2e-2 if model == "run" else difference.max() < 1 / 255 + 1e-5


@pytest.fixture
def compared(reported, tmp_path, monkeypatch):
    """``diffalign compare`` with some of the prompts: the page's data, and the texts in the picture."""
    drawn: list[str] = []
    collect_texts(monkeypatch, drawn)
    argv = ["compare", str(reported.folder), "--limit", "4", "--output_dir", str(tmp_path), "--images_per_prompt", "2"]
    assert main(argv) == 0
    page = (tmp_path / "compare.html").read_text()
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1]), drawn


def test_page_and_grid_of_a_limited_comparison_agree(reported, compared):
    data, drawn = compared
    chosen = [0, 2, 3, 5]
    assert [row["prompt"] for row in data["rows"]] == [reported.prompts[i].text for i in chosen]
    assert data["rewards"] == list(reported.order)
    assert data["all"]["images"] == 8
    for m, model in enumerate(("base", "run")):
        for r, name in enumerate(reported.order):
            scores = reported.scores(model, name)[chosen]
            first = [row["scores"][m][r] for row in data["rows"]]
            assert [math.nan if v is None else v for v in first] == pytest.approx(
                list(scores[:, 0]), nan_ok=True, **CLOSE
            )
            assert data["all"]["means"][m][r] == pytest.approx(np.nanmean(scores), **CLOSE)
    for name in reported.order:
        assert f"mean of 4: {name}" in drawn
        assert f"mean of 8: {name}" in drawn
    assert "Means over the 4 images shown, 1 per prompt, and over all 8 images, 2 per prompt." in " ".join(drawn)


def test_a_header_names_its_set_and_leaves_out_what_has_no_score(tmp_path, monkeypatch):
    drawn: list[str] = []
    collect_texts(monkeypatch, drawn)
    scores = {"base": {"r": torch.tensor([0.25, torch.nan])}, "tuned": {"r": torch.full((2,), torch.nan)}}
    images = {name: torch.rand(2, 3, 64, 64) for name in scores}
    totals = OverallMeans(40, {"r": {"base": 0.125, "tuned": math.nan}})
    compare_grid(images, ["a", "b"], scores, tmp_path / "a.png", totals)
    for label in ("mean of 2: r", "mean of 40: r", "0.25 (1 scored)", "0.125"):
        assert label in drawn
    assert drawn.count("–") == 2


def test_scores_of_files_are_those_of_the_images(reported, tmp_path, capsys):
    folder = reported.evaluated / "images/run/images"
    argv = ["score", str(folder), "--rewards", ",".join(reported.order), "--prompt", "one thing"]
    assert main([*argv, "--output_dir", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert list(rows[0])[2:] == list(reported.order)
    summary, printed = json.loads((tmp_path / "summary.json").read_text())["rewards"], capsys.readouterr().out
    for name in reported.order:
        wanted = np.array([{"zebra": zebra, "ape": ape}[name](np.asarray(Image.open(row["image"])) / 255, "one thing")
                           for row in rows])  # fmt: skip
        assert [float(row[name]) for row in rows] == pytest.approx(wanted, abs=1e-5)
        figures = [summary[name][key] for key in ("count", "mean", "std", "min", "max")]
        assert figures == pytest.approx(
            [wanted.size, wanted.mean(), wanted.std(), wanted.min(), wanted.max()], abs=1e-5
        )
        assert f"| {name} | {wanted.size} | {summary[name]['mean']:.4g} |" in printed
