"""The lock of a run folder; what a killed owner leaves is tested in tests/reliability."""

import errno
import os
import subprocess
import sys
import threading

import filelock
import pytest

from diffalign.runtime.lock import LOCK, FolderBusy, claimed, refuse_busy

HOLD = """
import sys
from pathlib import Path
from diffalign.runtime.lock import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(folder):
    with claimed(folder):
        pass


@pytest.mark.parametrize("attempt", [take, refuse_busy])
def test_a_second_run_is_refused_with_the_name_of_the_first_every_time(tmp_path, owner, attempt):
    for _ in range(3):  # a refused attempt leaves the owner's name in the file
        with pytest.raises(FolderBusy, match=rf"in use by process {owner.pid} on .+: wait for it, stop it, or choose"):
            attempt(tmp_path)


def test_a_killed_owner_does_not_stop_the_next_run(tmp_path, owner):
    owner.kill()
    owner.wait()
    assert (tmp_path / LOCK).exists()
    refuse_busy(tmp_path)
    take(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    refused = []

    def attempt():
        try:
            take(tmp_path)
        except FolderBusy as error:
            refused.append(str(error))

    with claimed(tmp_path):
        with pytest.raises(FolderBusy, match=f"process {os.getpid()} on"):
            take(tmp_path)
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1
    take(tmp_path)


def test_one_process_holds_the_lock_at_a_time_although_its_file_is_removed(tmp_path):
    """Owners that remove the file and waiters that have opened it before must not both hold it."""
    program = """
import os, sys
from pathlib import Path
from diffalign.runtime.lock import FolderBusy, claimed
folder, got = Path(sys.argv[1]), 0
while got < 40:
    try:
        with claimed(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            got += 1
    except FolderBusy:
        pass
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_warns_and_lets_the_run_go_on(tmp_path, monkeypatch, code):
    def refuse(self, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match=r"locks do not work there .*start one run only"):
        take(tmp_path)


@pytest.mark.parametrize("obstacle", [lambda path: path.mkdir(), lambda path: path.symlink_to("gone/away")])
@pytest.mark.parametrize("attempt", [take, refuse_busy])
def test_what_cannot_be_a_lock_file_is_named(tmp_path, obstacle, attempt):
    obstacle(tmp_path / LOCK)
    with pytest.raises(ValueError, match=r"\.diffalign\.lock cannot be opened .*: remove it, or choose another one"):
        attempt(tmp_path)


@pytest.mark.parametrize("leave", [lambda path: path.write_text("process 1 on nowhere"), lambda path: os.mkfifo(path)])
def test_what_a_crash_leaves_behind_is_no_obstacle(tmp_path, leave):
    leave(tmp_path / LOCK)
    refuse_busy(tmp_path)
    take(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*file/run cannot be written"):
        take(tmp_path / "file" / "run")
