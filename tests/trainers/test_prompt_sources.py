"""A run whose prompts come from a table and from a set by one word."""

import json

import yaml

from diffalign.cli import main
from diffalign.data.prompts import load_prompts
from tests.conftest import PIPELINE

HELD_OUT = "counting?split=test&limit=2"
SMALL = ["--num_groups", "2", "--group_size", "2", "--eval_num_steps", "2", "--plan.preset", "ode"]
SMALL += ["--plan.num_steps", "2", "--eval_images_per_prompt", "1", "--lora.rank", "2", "--max_sequence_length", "16"]


def test_a_run_keeps_what_it_read_and_resumes_with_the_same(tmp_path, capsys):
    table, run = tmp_path / "rows.csv", tmp_path / "run"
    table.write_text("caption,score\n" + "".join(f"a red circle {n},{n}\n" for n in range(8)))
    prompts = f"{table}?column=caption&limit=6"
    options = ["--model", str(PIPELINE), "--rewards", "brightness", "--train_prompts", prompts, *SMALL]
    options += ["--eval_prompts", HELD_OUT, "--eval_rewards", "brightness", "--output_dir", str(run)]

    def train(steps, *more):
        return main(["train", "forward_rl", *options, "--max_train_steps", str(steps), *more])

    assert train(1, "--checkpointing_steps", "1") in (0, None)
    assert yaml.safe_load((run / "config.yaml").read_text())["train_prompts"] == prompts
    assert load_prompts(run / "eval_prompts.jsonl") == load_prompts(HELD_OUT)
    assert train(2, "--resume_from_checkpoint", "latest") in (0, None)
    steps = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(filter(None, steps)) == 2

    table.write_text(table.read_text().replace("circle 3", "square 3"))
    assert train(3, "--resume_from_checkpoint", "latest") == 2
    assert "the training data have changed since this checkpoint" in capsys.readouterr().err
