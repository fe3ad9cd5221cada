"""R15 to R19: signals, lost processes and rewards that never answer."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from diffalign.runtime import checkpoint
from tests.conftest import ROOT
from tests.reliability import faults
from tests.reliability.compare import same_run
from tests.reliability.forks import Child, several
from tests.reliability.null import run

PHASES = ["collect", "reward", "backward", "save", "evaluate", "finish"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


@pytest.mark.parametrize("phase", PHASES[:-1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_r15_a_signal_in_any_phase_saves_and_says_how_to_go_on(tmp_path, straight, phase, number):
    child = Child(tmp_path, faults.signalled, str(tmp_path), phase, number)
    begun = time.perf_counter()
    code = child.wait()
    assert time.perf_counter() - begun < 30
    if phase == "save":  # the second save is the last thing that this run does
        assert code == 0
    else:
        assert code == 128 + number, child.text
        assert f"{number.name}: saving and stopping" in child.text
        assert "go on with:\n  python null.py" in child.text
        assert not list(tmp_path.glob(".diffalign-*"))
    run(tmp_path)
    same_run(tmp_path, straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_r15_the_command_line_leaves_with_its_code_while_it_loads(tmp_path, number, code):
    child = Child(tmp_path, faults.loads, number)
    assert child.wait() == code, child.text


def test_r16_a_second_signal_ends_it_at_once_and_the_last_checkpoint_is_sound(tmp_path):
    run(tmp_path / "begun", max_train_steps=4, lr_scheduler="constant")
    rng = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        os.makedirs(folder)
        os.system(f"cp -r {tmp_path}/begun/. {folder}")
        child = Child(folder, faults.stops_slowly, str(folder))
        child.until(lambda child=child: "going" in child.text)
        child.kill(signal.SIGTERM)
        time.sleep(rng.uniform(0.0, 0.02))
        child.until(lambda child=child: "saving and stopping" in child.text)
        child.kill(signal.SIGTERM)
        begun = time.perf_counter()
        assert child.wait() == 143
        assert time.perf_counter() - begun < 3
        found = checkpoint.latest(folder)
        assert checkpoint.load(found)[1]["step"] in (4, 6)


@pytest.mark.slow
def test_r17_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    begun = time.perf_counter()
    children = several(2, tmp_path, faults.signals_one, str(tmp_path))
    assert [child.wait() for child in children] == [143, 143]
    assert time.perf_counter() - begun < 30
    newest = checkpoint.latest(tmp_path)
    assert checkpoint.load(newest)[1]["step"] == 3
    assert [child.wait() for child in several(2, tmp_path, faults.in_two, str(tmp_path))] == [0, 0]
    straight = tmp_path / "straight"
    assert [child.wait() for child in several(2, straight, faults.in_two, str(straight))] == [0, 0]
    same_run(tmp_path, straight)


@pytest.mark.slow
def test_r18_a_lost_process_takes_the_others_along_and_a_restart_ends_as_if_nothing_had_been(tmp_path):
    for folder, restarts, code in ((tmp_path / "alone", 0, 1), (tmp_path / "again", 1, 0)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["--max-restarts", str(restarts), str(ROOT / "tests/reliability/lost.py"), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # Else restarted processes may find the addresses of those that are gone (pytorch's issue 135712).
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        family = []
        while launcher.poll() is None:
            family = psutil.Process(launcher.pid).children(recursive=True) or family
            time.sleep(0.1)
        assert launcher.returncode == code, launcher.stderr.read()[-3000:]
        if restarts == 0:
            assert time.time() - (folder / "killed").stat().st_mtime < 30
        assert not [process for process in family if process.is_running() and process.status() != "zombie"]
    straight = tmp_path / "straight"
    assert [child.wait() for child in several(2, straight, faults.in_two, str(straight))] == [0, 0]
    same_run(tmp_path / "again", straight)


def test_r19_a_reward_that_hangs_ends_the_run_with_all_stacks(tmp_path):
    begun = time.perf_counter()
    child = Child(tmp_path, faults.hangs, str(tmp_path), 2.0)
    assert child.wait() == 75
    assert time.perf_counter() - begun < 30
    (file,) = tmp_path.glob("stacks-*.txt")
    for said in (child.text, file.read_text()):
        assert "a_reward_that_hangs" in said
        assert "watchdog.py" in said, "all stacks, and not that of the main thread only"
    assert "no progress for 2 s (hang_timeout)" in child.text
    assert checkpoint.latest(tmp_path).name == "checkpoint-4"
    run(tmp_path, hang_timeout=3600.0)
    assert torch.tensor(checkpoint.load(checkpoint.latest(tmp_path))[1]["step"]) == 8
