"""The batch script of Slurm saves and requeues at the time limit, and the requeued job goes on, on a fake scheduler."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts/examples/slurm.sbatch"
SRUN = '#!/bin/bash\nexec "$@"\n'
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def job(tmp_path):
    """Return a function that starts the batch script as Slurm would."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ, "PATH": path, "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[0]", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "REQUEUED": str(tmp_path / "requeued"), "PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def start(*argv):
        return subprocess.Popen(["bash", str(SCRIPT), *argv], cwd=ROOT, env=environment)

    return start


def last_step(folder):
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return max((row["step"] for row in rows if "loss" in row), default=0)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_goes_on(job, tmp_path):
    run = tmp_path / "run"
    argv = [
        "flow_grpo", "--config", "flow_grpo/shapes", "--output_dir", str(run), "--num_groups", "2", "--group_size", "4",
        "--rollout_batch_size", "4", "--train_batch_size", "4", "--eval_prompts", "null", "--eval_steps", "0",
        "--eval_rewards", "[]", "--max_train_steps", "40", "--checkpointing_steps", "1000",
    ]  # fmt: skip
    first = job(*argv)
    begin = time.monotonic()
    while last_step(run) < 2:
        assert first.poll() is None, "the job ended by itself"
        assert time.monotonic() - begin < 240
        time.sleep(0.2)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(120) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    saved = last_step(run)
    assert 2 <= saved < 40
    assert (run / f"checkpoint-{saved}").is_dir()

    assert job(*argv).wait(300) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert steps == list(range(1, 41))
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
