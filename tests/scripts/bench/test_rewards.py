"""The reward benchmark runs every reward."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_rewards_are_timed_against_their_networks(tmp_path):
    tiny = ["--images", "2", "--side", "32", "--layers", "1", "--width", "64", "--repeats", "1"]
    command = [sys.executable, "scripts/bench/rewards.py", *tiny, "--write", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())["rewards"]
    judges = ["deqa", "mps", "aesthetic_v2.5", "soft_tifa", "prompt_echo", "dina_lrm", "evalmuse"]
    assert set(found) == {"pickscore", "aesthetic", "hpsv2.1", "vqascore", *judges}
    assert all(figures["ratio"] > 0 for figures in found.values())
