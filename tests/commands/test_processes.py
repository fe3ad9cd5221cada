"""Two processes evaluate what one does."""

import os
import subprocess
import sys

import pytest

from diffalign.cli import main
from tests.conftest import PIPELINE, PROMPTS, ROOT


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(tmp_path):
    options = ["--model", str(PIPELINE), "--prompts", str(PROMPTS / "shapes_validation.jsonl"), "--limit", "4"]
    options += ["--rewards", "shapes", "--num_steps", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "diffalign", "eval", *options, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]

    assert main(["eval", *options, "--output_dir", str(tmp_path / "one")]) in (0, None)
    two, one = ((tmp_path / name / "results.json").read_text() for name in ("two", "one"))
    assert two == one
