"""The Diffusion-DPO benchmark adds up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_bench_of_pairs_adds_up(tmp_path):
    tiny = ["--num_pairs", "4", "--train_batch_size", "2", "--eval_prompts", "null", "--data.scan", "2"]
    command = [sys.executable, "scripts/bench/dpo.py", *tiny, "--repeats", "1", "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["pairs_per_second"] == pytest.approx(4 / sum(found["seconds"].values()))
    assert found["bare_pairs_per_second"] == pytest.approx(4 / sum(found["bare_seconds"].values()))
    assert set(found["bare_seconds"]) == {"forward and backward", "reference forward", "optimizer"}
    assert found["ratio"] == pytest.approx(found["bare_pairs_per_second"] / found["pairs_per_second"])
