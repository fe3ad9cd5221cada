"""The benchmark of forward-process RL adds up, and its iterations run what the forecast says."""

import importlib
import json
import sys

import pytest

from tests.conftest import ROOT


def test_the_bench_adds_up(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, file = importlib.import_module("scripts.bench.forward_rl"), tmp_path / "bench.json"
    tiny = ["--num_groups", "2", "--group_size", "4", "--plan.num_steps", "4", "--time_fraction", "1.0"]
    tiny += ["--eval_prompts", "null", "--eval_rewards", "[]", "--repeats", "1", "--reference_weight", "0.1"]
    monkeypatch.setattr(sys, "argv", ["forward_rl.py", *tiny, "--write", str(file)])
    module.main()
    found = json.loads(file.read_text())
    assert found["seconds_per_iteration"] == pytest.approx(sum(found["seconds"].values()))
    # Two times an image: the lagged weights and the base model are compared at each.
    assert found["evaluations_per_image"] == {module.SAMPLING: 4, module.COMPARING: 4, module.TRAINING: 2}
    bare = sum(found["bare_seconds"].values())
    assert found["ratio"] == pytest.approx(found["seconds_per_iteration"] / bare)
    assert 0.2 < found["ratio"] < 10
