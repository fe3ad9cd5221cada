"""Runs whose prompts come from tables and from sets by one word."""

import json

import pytest
import yaml

from diffalign.cli import main
from diffalign.data.prompts import load_prompts
from tests.conftest import PIPELINE

SMALL = ["--num_groups", "2", "--group_size", "2", "--max_sequence_length", "16", "--eval_num_steps", "2"]
SMALL += ["--plan.preset", "ode", "--plan.num_steps", "2"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("caption,score\n" + "".join(f"a red circle {n},{n}\n" for n in range(8)))
    return path


def command(folder, prompts, steps, *more):
    options = ["--model", str(PIPELINE), "--rewards", "brightness", "--train_prompts", prompts]
    options += ["--eval_prompts", "counting?split=test&limit=2", "--eval_rewards", "brightness"]
    options += ["--output_dir", str(folder), "--max_train_steps", str(steps)]
    return ["train", "forward_rl", *options, *SMALL, *more]


@pytest.mark.parametrize("prompts", ["{table}?column=caption&limit=6", "spatial?limit=6&seed=3"])
def test_a_run_keeps_what_it_read_and_resumes(prompts, table, tmp_path):
    prompts, run = prompts.format(table=table), tmp_path / "run"
    assert main(command(run, prompts, 1, "--checkpointing_steps", "1")) in (0, None)
    assert yaml.safe_load((run / "config.yaml").read_text())["train_prompts"] == prompts
    assert load_prompts(run / "eval_prompts.jsonl") == load_prompts("counting?split=test&limit=2")
    assert main(command(run, prompts, 2, "--resume_from_checkpoint", "latest")) in (0, None)
    steps = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(filter(None, steps)) == 2


def test_a_changed_table_is_named_when_a_run_resumes(table, tmp_path, capsys):
    prompts, run = f"{table}?column=caption", tmp_path / "run"
    assert main(command(run, prompts, 1, "--checkpointing_steps", "1")) in (0, None)
    table.write_text(table.read_text().replace("circle 7,7", "circle 7,8"))  # metadata alone
    assert main(command(run, prompts, 2, "--resume_from_checkpoint", "latest")) == 2
    assert f"train_prompts {table}" in capsys.readouterr().err
