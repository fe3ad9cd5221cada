"""``diffalign rank``: best of n as files, a grid, and data that training reads."""

import json

import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.commands.rank import ranked
from diffalign.evaluation.scored_images import ScoredImages
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
        assert grid.width > 3 * 64


@pytest.mark.parametrize(("table", "loss"), [("pairs", "dpo"), ("sft", "sft")])
def test_training_reads_the_tables(folder, tmp_path, table, loss):
    argv = ["train", "diffusion_dpo", "--model", str(PIPELINE), "--max_sequence_length", "16", "--train_data",
            str(folder / f"base-{table}.jsonl"), "--loss", loss, "--num_pairs", "2", "--train_batch_size", "2",
            "--max_train_steps", "1", "--lora.rank", "2", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 0
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()
