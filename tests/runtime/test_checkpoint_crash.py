import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from diffalign.runtime import checkpoint
from diffalign.runtime.checkpoint import CheckpointError


def write(folder, step, value=None, keep=None):
    value = step if value is None else value
    return checkpoint.save(
        folder, step, {"weights": {"w": torch.full((3,), float(value))}}, {"value": value}, keep=keep
    )


def value_of(path):
    tensors, state = checkpoint.load(path)
    assert tensors["weights"]["w"].tolist() == [float(state["value"])] * 3
    return state["value"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Crash(BaseException):
    """Not an Exception: no cleanup runs, as when the process is killed."""


class Clock:
    """Stops the process, so to say, before call number ``at`` to the file system."""

    def __init__(self, monkeypatch, at, error=Crash):
        self.calls, self.at, self.error = 0, at, error
        for module, name in [
            (os, "mkdir"), (os, "rename"), (os, "fsync"), (os, "open"), (os, "unlink"), (os, "rmdir"), (os, "chmod"),
            (Path, "open"), (checkpoint, "save_file"),
        ]:  # fmt: skip
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, call):
        def wrapped(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                raise self.error
            return call(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("step", [3, 2])
@pytest.mark.parametrize("error", [Crash, OSError])
def test_a_crash_before_any_call_leaves_the_old_or_the_new(tmp_path, step, error):
    """Step 3 is new, step 2 replaces a checkpoint; the save prunes step 1 only when it has succeeded."""
    outcomes, at, clock = [], 0, None
    write(tmp_path / "before", 1), write(tmp_path / "before", 2)
    while clock is None or clock.calls >= at:
        at += 1
        run = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", run)
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch, at, error)
            with contextlib.suppress(error, CheckpointError):
                write(run, step, value=77, keep=2)
        found = value_of(checkpoint.latest(run))
        assert found in (2, 77)
        sound = [path for path in run.glob("checkpoint-*") if not checkpoint.verify(path)]
        assert len(sound) >= 2, (at, names(run))
        outcomes.append(found)
        checkpoint.sweep(run)
        assert value_of(checkpoint.latest(run)) == found
        if at % 4 == 0:
            write(run, step, value=88, keep=2)
            assert value_of(checkpoint.latest(run)) == 88
            assert names(run) == [f"checkpoint-{s}" for s in ((2, 3) if step == 3 else (1, 2))]
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == 2
    assert outcomes[-1] == 77
    assert len(outcomes) > 20


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("call", ["save_file", "fsync", "rename"])
def test_a_failed_save_leaves_no_trace(tmp_path, call, step):
    write(tmp_path, 1)

    def full(*args):
        if call != "rename" or str(args[0]).rpartition("/")[2].startswith(".diffalign-"):
            raise OSError(28, "No space left on device")
        return os.replace(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint if call == "save_file" else os, call, full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, step, value=77)
    assert names(tmp_path) == ["checkpoint-1"]
    assert value_of(tmp_path / "checkpoint-1") == 1


def test_old_checkpoints_that_cannot_be_removed_are_only_reported(tmp_path, caplog, monkeypatch):
    write(tmp_path, 1), write(tmp_path, 2)

    def refuse(path, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert value_of(write(tmp_path, 3, keep=2)) == 3
    assert "could not remove old checkpoints" in caplog.text
