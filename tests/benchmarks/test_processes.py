"""Two processes share a benchmark, and one can go on where two were killed."""

import json
import os
import subprocess
import sys

import pytest

from diffalign.cli import main
from tests.benchmarks.test_bench import GUIDED, PLAIN, assert_same, results
from tests.conftest import PIPELINE, ROOT


def launched(argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29643"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "diffalign", *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_share_a_benchmark(bench, tmp_path):
    argv = bench.argv("dpg_bench", str(PIPELINE), tmp_path / "two")
    launched(argv)
    found = results(tmp_path / "two")["columns"]
    assert main(bench.argv("dpg_bench", str(PIPELINE), tmp_path / "one")) == 0
    alone = results(tmp_path / "one")["columns"]
    for title in (GUIDED, PLAIN):
        assert_same(found[title], alone[title])
    rows = {path.name.rsplit("-", 1)[1]: path for path in (tmp_path / "two").rglob("guidance-3/*/answers/*.jsonl")}
    assert set(rows) == {"0.jsonl", "1.jsonl"}
    assert {json.loads(line)["prompt"] for line in rows["1.jsonl"].read_text().splitlines()} == {1}

    rows["1.jsonl"].unlink()  # a process was killed before it answered; one process goes on
    assert main(argv) == 0
    for title in (GUIDED, PLAIN):
        assert_same(results(tmp_path / "two")["columns"][title], alone[title])
