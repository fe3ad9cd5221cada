"""The Flow-GRPO benchmark adds up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_bench_adds_up(tmp_path):
    tiny = ["--num_groups", "2", "--group_size", "4", "--eval_prompts", "null", "--repeats", "1"]
    tiny += ["--plan.window_range", "[2, 4]"]
    command = [sys.executable, "scripts/bench/flow_grpo.py", *tiny, "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["seconds_per_iteration"] == pytest.approx(sum(found["seconds"].values()))
    assert found["evaluations_per_image"]["sampling"] == pytest.approx(6 + 2 / 4)
    assert found["ratio"] > 0
