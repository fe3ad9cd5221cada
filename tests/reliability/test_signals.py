"""R15 to R19: signals, lost processes and rewards that never answer."""

import math
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
from diffalign.runtime.signals import STOPPING, Signals
from diffalign.runtime.watchdog import Watchdog
from tests.conftest import ROOT
from tests.reliability import faults
from tests.reliability.compare import same_run
from tests.reliability.forks import Child, several
from tests.reliability.null import run

PHASES = ["sample", "score", "backward", "save", "evaluate", "finish"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


@pytest.mark.parametrize("phase", PHASES[:-1])
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_r15_a_signal_in_any_phase_saves_and_says_how_to_go_on(tmp_path, straight, phase, number):
    child = Child(tmp_path, faults.signalled, str(tmp_path), phase, number)
    started = time.perf_counter()
    code = child.wait()
    assert time.perf_counter() - started < 30
    if phase == "save":  # the second save is the last thing that this run does
        assert code == 0
    else:
        assert code == 128 + number, child.text
        assert f"{number.name}: saving and stopping" in child.text
        assert "go on with:\n  python null.py" in child.text
        assert not list(tmp_path.glob(".diffalign-*"))
    run(tmp_path)
    same_run(tmp_path, straight)


@pytest.mark.parametrize(("number", "code"), [(number, 128 + number) for number in STOPPING])
def test_r15_the_command_line_leaves_with_its_code_while_it_loads(tmp_path, number, code):
    child = Child(tmp_path, faults.loads, number)
    assert child.wait() == code, child.text


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_r15_a_warning_that_comes_twice_does_not_cut_the_save_short(tmp_path, number):
    """A terminal that closes sends SIGHUP twice; Slurm sends SIGTERM some time after its warning."""
    for second in (number, signal.SIGTERM):
        folder = tmp_path / second.name
        child = Child(folder, faults.stops_slowly, str(folder))
        child.until(lambda child=child: "going" in child.text)
        child.kill(number)
        child.until(lambda child=child: "saving and stopping" in child.text)
        child.kill(second)
        assert child.wait() == 128 + number, child.text
        assert checkpoint.load(checkpoint.latest(folder))[1]["step"] >= 4


def test_r15_a_hang_up_that_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_r16_a_second_signal_ends_it_at_once_and_the_last_checkpoint_is_sound(tmp_path):
    run(tmp_path / "before", max_train_steps=4, lr_scheduler="constant")
    rng = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        os.makedirs(folder)
        os.system(f"cp -r {tmp_path}/before/. {folder}")
        child = Child(folder, faults.stops_slowly, str(folder))
        child.until(lambda child=child: "going" in child.text)
        child.kill(signal.SIGTERM)
        time.sleep(rng.uniform(0.0, 0.02))
        child.until(lambda child=child: "saving and stopping" in child.text)
        child.kill(signal.SIGTERM)
        started = time.perf_counter()
        assert child.wait() == 143
        assert time.perf_counter() - started < 3
        found = checkpoint.latest(folder)
        assert checkpoint.load(found)[1]["step"] in (4, 6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_r17_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, number):
    started = time.perf_counter()
    children = several(2, tmp_path, faults.signals_one, str(tmp_path), number)
    assert sorted(child.wait() for child in children) == sorted([143, 128 + number])
    assert time.perf_counter() - started < 30
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
    started = time.perf_counter()
    child = Child(tmp_path, faults.hangs, str(tmp_path), 2.0)
    assert child.wait() == 75
    assert time.perf_counter() - started < 30
    (file,) = tmp_path.glob("stacks-*.txt")
    for said in (child.text, file.read_text()):
        assert "a_reward_that_hangs" in said
        assert "watchdog.py" in said, "all stacks, and not that of the main thread only"
    assert "no progress for 2 s (hang_timeout)" in child.text
    assert checkpoint.latest(tmp_path).name == "checkpoint-4"
    run(tmp_path, hang_timeout=3600.0)
    assert torch.tensor(checkpoint.load(checkpoint.latest(tmp_path))[1]["step"]) == 8


def test_r19_a_hang_that_holds_the_lock_of_python_ends_the_run_with_all_stacks(tmp_path):
    child = Child(tmp_path, faults.holds_the_lock_of_python, str(tmp_path), 1.0)
    assert child.wait() == -signal.SIGKILL, "nothing in the process can exit any more"
    (file,) = tmp_path.glob("stacks-*.txt")
    for said in (child.text, file.read_text()):
        assert "in hook" in said
        assert "watchdog.py" in said
    assert "no progress for 1 s (hang_timeout)" in child.text
    assert checkpoint.latest(tmp_path).name == "checkpoint-4"


def test_r19_a_run_that_is_suspended_for_longer_than_the_limit_goes_on(tmp_path):
    child = Child(tmp_path, faults.waits, str(tmp_path), 1.0)
    child.until((tmp_path / "waiting").exists)
    child.kill(signal.SIGSTOP)
    time.sleep(3)
    child.kill(signal.SIGCONT)
    assert child.wait() == 0, child.text
    assert (tmp_path / "done.txt").read_text() == "8"


@pytest.mark.parametrize("limit", [0.0, math.inf, 1e38, 1e300, float("nan")])
def test_r19_the_watchdog_survives_any_limit(tmp_path, limit):
    with Watchdog(limit, tmp_path) as watchdog:
        watchdog.beat()
        time.sleep(0.05)
    with watchdog:
        watchdog.beat()


def test_r19_a_load_that_reads_is_alive_and_one_that_does_not_is_not(tmp_path, monkeypatch):
    ended, read = [], [0]
    monkeypatch.setattr("diffalign.runtime.watchdog._traffic", lambda: lambda: read[0])
    watchdog = Watchdog(0.3, tmp_path, loading=True)
    monkeypatch.setattr(watchdog, "_end", lambda: ended.append(True))
    with watchdog:
        for _ in range(8):
            read[0] += 1 << 21
            time.sleep(0.1)
        assert not ended
        time.sleep(0.8)
        assert ended
