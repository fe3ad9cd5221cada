"""``diffalign rank``: best of n as files, a grid, and data that training reads."""

import json

import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.commands.rank import _grid, ranked
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.report.grids import TEXT_WIDTH
from diffalign.structures import Prompt
from tests.conftest import PIPELINE


def test_images_are_sorted_by_prompt_and_those_without_a_score_left_out():
    scores = torch.tensor([0.1, 0.3, float("nan"), 0.2, 0.2, 0.2])
    own = ScoredImages(torch.tensor([0, 0, 0, 1, 1, 1]), {"r": scores}, [None] * 6)
    first, second = ranked([Prompt("a"), Prompt("b")], own, "r")
    assert (first.rows, first.scores) == ([1, 0], pytest.approx([0.3, 0.1]))
    assert second.rows == [3, 4, 5]
    assert first.told_apart
    assert not second.told_apart


def test_the_grid_has_every_prompt_and_blanks_for_images_without_a_score(tmp_path, monkeypatch):
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(file)
    nan = float("nan")
    own = ScoredImages(torch.tensor([0, 0, 0, 1, 1, 1]), {"r": torch.tensor([0.1, 0.3, 0.2, nan, 0.5, nan])}, files)
    drawn = {}
    monkeypatch.setattr(
        "diffalign.commands.rank.compare_grid", lambda *found, **more: drawn.update({**dict(enumerate(found)), **more})
    )
    prompts = [Prompt(text, {"image": str(file)}) for text, file in zip("ab", files[1:], strict=False)]
    _grid(tmp_path / "grid.png", ranked(prompts, own, "r"), own, "r", True)
    assert (drawn["sources"][:, 0, 0, 0] * 255).round().tolist() == [40, 80]
    columns, prompts, scores = drawn[0], drawn[1], drawn[2]
    assert prompts == ["a", "b"]
    assert list(columns) == ["best", "2", "worst of 3"]
    reds = {name: (images[:, 0, 0, 0] * 255).round().int().tolist() for name, images in columns.items()}
    assert reds == {"best": [40, 160], "2": [80, 255], "worst of 3": [0, 255]}
    assert [scores[name]["r"].isnan().tolist() for name in columns] == [[False, False], [False, True], [False, True]]


@pytest.fixture(scope="module")
def folder(eval_prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("rank")
    argv = ["rank", "--model", str(PIPELINE), "--max_sequence_length", "16", "--prompts", str(eval_prompts), "--limit",
            "3", "--rewards", "brightness,shapes", "--images_per_prompt", "3", "--num_steps", "2", "--best", "2",
            "--output_dir", str(out)]  # fmt: skip
    assert main(argv) == 0
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_of_n_as_files_grid_and_tables(folder):
    assert sorted(path.name for path in (folder / "base/best").iterdir()) == [
        f"{i:05d}-{place}.png" for i in range(3) for place in (1, 2)
    ]
    found = lines(folder / "base-ranking.jsonl")
    assert len(found) == 9
    for prompt in {row["prompt"] for row in found}:
        own = [row for row in found if row["prompt"] == prompt]
        values = [row["scores"]["brightness"] for row in own]
        assert values == sorted(values, reverse=True)
        assert [row["rank"] for row in own] == [1, 2, 3]
    best = [row for row in found if row["rank"] == 1]
    assert [row["image"] for row in lines(folder / "base-sft.jsonl")] == [row["image"] for row in best]
    assert (folder / best[0]["image"]).read_bytes() == (folder / "base/best/00000-1.png").read_bytes()
    with Image.open(folder / "base.png") as grid:
        assert grid.width == TEXT_WIDTH + 2 * 8 + 3 * (128 + 8)  # prompts, then the images by rank


@pytest.mark.parametrize(("table", "loss"), [("pairs", "dpo"), ("sft", "sft")])
def test_training_reads_the_tables(folder, tmp_path, table, loss):
    argv = ["train", "diffusion_dpo", "--model", str(PIPELINE), "--max_sequence_length", "16", "--train_data",
            str(folder / f"base-{table}.jsonl"), "--loss", loss, "--num_pairs", "2", "--train_batch_size", "2",
            "--max_train_steps", "1", "--lora.rank", "2", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 0
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()
