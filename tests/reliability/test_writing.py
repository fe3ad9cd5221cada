"""R1 to R7: whatever happens while a checkpoint is written, the last good one is there."""

import shutil
from pathlib import Path

import pytest
import torch

from diffalign.runtime import checkpoint
from diffalign.runtime.errors import NotFinite
from tests.reliability import faults, kills
from tests.reliability.compare import same_checkpoint, same_run, tree
from tests.reliability.forks import Child
from tests.reliability.null import run, settings
from tests.reliability.trainers import QUICK, TRAINERS, short


def sound(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*") if not checkpoint.verify(path))


@pytest.fixture(scope="module", params=[2, 3])
def deaths(request, tmp_path_factory):
    """A folder for each call at which a save was cut, and how many checkpoints it may keep."""
    root = tmp_path_factory.mktemp("deaths")
    assert Child(root, faults.dies_at_every_call, str(root), request.param).wait() == 0
    return root, request.param


def each(root):
    found = [path for path in root.iterdir() if path.name.isdigit()]
    assert len(found) > 25, "so many calls does a save make"
    return sorted(found, key=lambda path: int(path.name))


def test_r1_a_crash_at_any_call_of_a_save_leaves_the_old_or_the_new(deaths, tmp_path):
    root, _ = deaths
    names = []
    for folder in each(root):
        found = checkpoint.latest(folder)
        same_checkpoint(found, root / ("before" if found.name == "checkpoint-4" else "done") / found.name)
        checkpoint.sweep(folder)
        assert not list(folder.glob(".diffalign-*"))
        names.append(found.name)
    assert set(names) == {"checkpoint-4", "checkpoint-6"}
    assert names == sorted(names), "once the new one is there, it stays"
    run(tmp_path / "straight", checkpointing_steps=2)
    for folder in each(root)[::12]:
        run(folder, checkpointing_steps=2)
        same_run(folder, tmp_path / "straight")


def test_r6_no_crash_leaves_fewer_sound_checkpoints_than_there_were(deaths):
    root, keep = deaths
    assert len(sound(root / "before")) == 2
    assert len(sound(root / "done")) == min(3, keep)
    for folder in each(root):
        assert len(sound(folder)) >= 2, folder.name


def test_r6_one_is_not_enough(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        settings(tmp_path, checkpoints_total_limit=1).validate()


def killed(folder, times, record_property):
    for number in range(times):
        kills.kill(folder, number)
    kills.same_in_the_end(folder)
    record_property("kills", times)


def test_r2_a_run_killed_at_random_loses_nothing_that_was_saved(tmp_path, record_property):
    killed(tmp_path / "run", 20, record_property)


@pytest.mark.slow
def test_r2_two_hundred_kills(tmp_path, record_property):
    killed(tmp_path / "run", 200, record_property)


def test_r3_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_until_the_third_time(tmp_path):
    once, often = tmp_path / "once", tmp_path / "often"
    assert Child(once, faults.small_disk, str(once), 9000, 6).wait() == 74
    child = Child(often, faults.small_disk, str(often), 9000, 30)
    assert child.wait() == 74
    for folder in (once, often):
        assert sound(folder) == ["checkpoint-2"]
        assert not list(folder.glob(".diffalign-*")), "no part of a checkpoint is left"
    assert "checkpoint-8" in child.text, "the run went on"
    assert "checkpoint-10" not in child.text
    for said in (str(often), "65,540 bytes", "the run goes on", "free space", "last good checkpoint"):
        assert said in child.text, said


def test_r3_a_row_that_the_disk_refuses_comes_later_and_whole(tmp_path, monkeypatch):
    from diffalign.runtime.tracking import MetricsLog

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"a": 1})
    original = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            return self.file.write(content[: len(content) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    append = log._append
    monkeypatch.setattr(log, "_append", lambda file: append(Full(file)))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: .*No space left.*waits"):
        log.write(2, {"a": 2})
    assert [row["step"] for row in MetricsLog.read(log.path)] == [1]
    monkeypatch.setattr(log, "_append", append)
    log.write(3, {"a": 3})
    assert [row["step"] for row in MetricsLog.read(log.path)] == [1, 2, 3]
    assert Path.open is original


def test_r4_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    steps = []
    monkeypatch.setattr(Path, "write_text", refused)  # root, who may write everything, runs tests too
    with pytest.raises(ValueError, match=r"output_dir .* cannot be written \(Permission denied\): choose another"):
        run(tmp_path / "run", lambda phase, task: steps.append(phase))
    assert not steps


DAMAGES = {
    "flip": lambda path: path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1])),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "delete": Path.unlink,
}


@pytest.mark.parametrize("name", QUICK)
def test_r5_no_damaged_checkpoint_is_accepted(name, tmp_path, caplog, record_property):
    args = short(name, tmp_path / "run", checkpointing_steps=1)
    TRAINERS[name].make(args).train()
    (previous, newest), accepted, tried = sorted(args.output_dir.glob("checkpoint-*")), 0, 0
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for damage in DAMAGES.values():
            damage(file)
            tried += 1
            accepted += not checkpoint.verify(newest)
            caplog.clear()
            assert checkpoint.latest(args.output_dir) == previous
            assert file.name in caplog.text
            with pytest.raises(ValueError, match=f"cannot resume: .*{file.name}.*{previous.name}"):
                checkpoint.resolve(args.output_dir, str(newest))
            file.write_bytes(content)
    record_property("damaged", tried)
    record_property("accepted", accepted)
    assert accepted == 0
    assert tried >= 3 * 5
    assert checkpoint.latest(args.output_dir) == newest


@pytest.mark.parametrize("group", ["weights", "optimizer", "ema"])
def test_r7_a_state_that_is_not_finite_is_never_published(tmp_path, group):
    def hook(phase, task):
        if phase == "evaluate" and task.loop.progress.step == 8:
            optimizer = task.loop.state.optimizer.optimizer
            moments = [state["exp_avg"] for state in optimizer.state.values()]
            tensors = {"weights": task.loop.state.parameters, "optimizer": moments, "ema": task.loop.state.ema.shadow}
            with torch.no_grad():
                tensors[group][0][0, 0] = torch.nan

    with pytest.raises(NotFinite, match=f"{group}/.* is not finite.*last good checkpoint: .*checkpoint-4"):
        run(tmp_path, hook)
    assert sound(tmp_path) == ["checkpoint-4"]
    before = tree(tmp_path / "checkpoint-4")
    shutil.copytree(tmp_path, tmp_path / "copy")
    run(tmp_path / "copy")
    assert tree(tmp_path / "checkpoint-4") == before
