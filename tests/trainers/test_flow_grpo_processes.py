"""The same training in one process and in two, forked or started by both launchers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.rollout.buffer import RolloutBuffer
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import ROOT
from tests.reliability.forks import finished
from tests.trainers.short_training import main

SCRIPT = "tests/trainers/short_training.py"
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 --main_process_port {port}",
    "torchrun": "torchrun --nproc_per_node 2 --master_port {port}",
}


def launcher_command(name):
    program, *options = LAUNCHERS[name].format(port=free_port()).split()
    return [BIN / program, *options]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train(command, folder):
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), SCRIPT, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return finished(1, tmp_path_factory.mktemp("alone"), main)


@pytest.mark.parametrize("launcher", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS)])
def test_two_processes_do_what_one_does(alone, tmp_path, launcher):
    two = tmp_path / "two"
    folder = train(launcher_command(launcher), two) if launcher else finished(2, two, main)
    files = (alone / "0.safetensors", folder / "0.safetensors", folder / "1.safetensors")
    one, first, second = map(load_file, files)
    assert (one["world"], first["world"], second["world"]) == (1, 2, 2)
    texts = [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert (alone / "0.txt").read_text() == "\n".join(texts)
    assert (torch.cat([first["images"], second["images"]]) - one["images"]).abs().max() < 1e-5
    for name in (n for n in one if n.startswith(("grad/", "weight/"))):
        assert torch.equal(first[name], second[name]), f"the processes disagree on {name}"
        bound = 1e-5 * one[name].norm() if name.startswith("grad/") else 1e-5
        assert (first[name] - one[name]).norm() <= bound, name
    rows = [MetricsLog.read(f / "run" / "metrics.jsonl") for f in (alone, folder)]
    for single, double in zip(*rows, strict=True):
        for name in ("reward/mean", "reward/std", "zero_std_groups", "kl"):
            if name in single:
                assert double[name] == pytest.approx(single[name], rel=1e-4, abs=1e-7), name
    same_rollouts(alone / "run/rollouts", folder / "run/rollouts")


def same_rollouts(alone, both):
    """What two processes wrote loads as the one buffer that one process wrote."""
    one, two = RolloutBuffer.load(alone), RolloutBuffer.load(both)
    for column in ("group", "sample", "parent", "step", "trained"):
        assert torch.equal(getattr(one, column), getattr(two, column)), column
    assert (one.x - two.x).norm() < 1e-3 * one.x.norm()
    assert one.prompts == two.prompts
    listed = [[json.loads(line) for line in (f / "metadata.jsonl").read_text().splitlines()] for f in (alone, both)]
    assert [line["file_name"] for line in listed[0]] == [line["file_name"] for line in listed[1]]
    assert all((both / line["file_name"]).is_file() for line in listed[1])


@pytest.mark.slow
def test_a_launcher_that_starts_too_few_is_refused(tmp_path):
    command = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", SCRIPT, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "asked for 2 process(es)" in done.stderr
