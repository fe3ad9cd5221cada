"""The ReFL benchmark: seconds add up, and each saving is measured in its own process."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
TINY = ["--num_groups", "2", "--rollout_batch_size", "2", "--train_batch_size", "2", "--eval_prompts", "null"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.chdir(ROOT)
    return importlib.import_module("scripts.bench.refl")


def test_the_bench_adds_up(bench):
    step = bench.timed(ROOT / "configs/refl/shapes.yaml", TINY, 1)
    assert step["ratio"] == pytest.approx(step["seconds_per_step"] / sum(step["bare_seconds"].values()))
    assert step["steps_per_second"] == pytest.approx(1 / step["seconds_per_step"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(), reason="Linux's figures")
def test_memory_that_was_needed_before_does_not_hide_what_a_step_needs(bench):
    earlier = torch.ones(2**26)  # 256 MiB
    del earlier
    before = bench.forget_peak()
    step = torch.ones(2**25)
    del step
    assert bench.peak_since() - before == pytest.approx(2**-3, rel=0.05)


@pytest.mark.slow
def test_the_bench_measures_each_saving_in_a_process_of_its_own(tmp_path):
    sizes = ["--num_groups", "16", "--rollout_batch_size", "16", "--train_batch_size", "16"]  # of two nothing is saved
    command = [sys.executable, "scripts/bench/refl.py", *TINY, *sizes, "--repeats", "1"]
    command += ["--savings", "none", "train_batch_size 1", "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())["memory"]["own"]
    assert list(found) == ["none", "train_batch_size 1"]
    assert all(one["peak_gib"] > one["step_gib"] > 0 for one in found.values())
    assert found["train_batch_size 1"]["step_gib"] < found["none"]["step_gib"]
