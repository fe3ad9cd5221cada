"""Copies of run folders: complete or not found, repeated after failures, and the newest of both places to resume."""

import re
from types import SimpleNamespace

import pytest
import torch

from diffalign.runtime import checkpoint
from diffalign.runtime.checkpoint import CheckpointError
from diffalign.runtime.manifest import MANIFEST, verify
from diffalign.runtime.output_copy import OutputCopy, find_checkpoint
from tests.store import opened

WHERE = "store://b/x"


@pytest.fixture
def store(monkeypatch, tmp_path):
    return opened(monkeypatch, tmp_path / "cache")


@pytest.fixture
def said(monkeypatch):
    """What a copy logs."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(f"diffalign.runtime.output_copy.logger.{level}", lines.append)
    return lines


def save(folder, step, seed=0):
    """Write a checkpoint and a row of the log, as a run does."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(f'{{"step": {step}}}\n')
    weights = {"weights": {"w": torch.full((2,), float(step + seed))}}
    return checkpoint.save(folder, step, weights, {"rows": step}, keep=2)


def copied(folder, target=WHERE):
    """Copy once, as at the end of a run."""
    with OutputCopy(folder, target, keep=2):
        pass


def config(folder, resume="latest", copy=WHERE):
    return SimpleNamespace(output_dir=folder, resume_from_checkpoint=resume, output_copy=copy)


def test_the_newest_of_both_places_is_resumed(store, said, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    save(here, 1)
    copied(here)
    assert find_checkpoint(config(elsewhere)) == elsewhere / "checkpoint-1"
    save(elsewhere, 2)
    copied(elsewhere)
    assert find_checkpoint(config(here)) == here / "checkpoint-2"
    assert (here / "metrics.jsonl").read_bytes() == (elsewhere / "metrics.jsonl").read_bytes()
    save(here, 3)
    assert find_checkpoint(config(here)) == here / "checkpoint-3"
    assert find_checkpoint(config(tmp_path / "new", copy="store://b/empty")) is None


@pytest.mark.parametrize("marks", [None, "/", ""])
@pytest.mark.parametrize("resume", [WHERE, f"{WHERE}/", f"{WHERE}/checkpoint-2"])
def test_an_address_is_resumed_in_an_empty_folder(resume, marks, store, said, tmp_path):
    type(store).marks = marks
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    copied(tmp_path / "run")
    assert find_checkpoint(config(tmp_path / "new", resume, None)) == tmp_path / "new" / "checkpoint-2"
    sent = len(store.sent)
    assert find_checkpoint(config(tmp_path / "new", resume, None)) == tmp_path / "new" / "checkpoint-2"
    assert len(store.sent) == sent  # it is there already
    save(tmp_path / "other", 2, seed=7)
    with pytest.raises(CheckpointError, match=r"it has checkpoint-2, which is not from there; pass 'latest', or"):
        find_checkpoint(config(tmp_path / "other", resume, None))


def test_damaged_and_incomplete_copies_are_passed_over(store, said, tmp_path):
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    copied(tmp_path / "run")
    store.pipe_file("/b/x/checkpoint-2/weights.safetensors", b"damaged")
    assert find_checkpoint(config(tmp_path / "a", WHERE)) == tmp_path / "a" / "checkpoint-1"
    assert any("skipping checkpoint-2 of store://b/x" in line for line in said)
    store.rm_file(f"/b/x/checkpoint-2/{MANIFEST}")
    for name in ("checkpoint-2", "checkpoint-9"):
        with pytest.raises(
            CheckpointError, match=f"there is no complete checkpoint at {WHERE}/{name}: check the address"
        ):
            find_checkpoint(config(tmp_path / "b", f"{WHERE}/{name}"))
    store.pipe_file("/b/x/checkpoint-1/weights.safetensors", b"damaged")
    with pytest.raises(CheckpointError, match="no checkpoint at store://b/x is undamaged"):
        find_checkpoint(config(tmp_path / "b", WHERE))


def test_a_store_that_does_not_answer_is_no_fresh_start(store, said, tmp_path, monkeypatch):
    def exists(self, path, **kwargs):
        raise OSError("connection reset by peer")

    monkeypatch.setattr(type(store), "exists", exists)
    for resume in ("latest", WHERE):
        with pytest.raises(CheckpointError, match="cannot resume: store://b/x cannot be reached"):
            find_checkpoint(config(tmp_path / "run", resume))


def test_a_lost_connection_is_said_once_and_made_up_for(store, said, tmp_path, monkeypatch):
    run, put = tmp_path / "run", type(store).pipe_file
    lost = True

    def pipe_file(self, path, value, **kwargs):
        if lost and "/checkpoint-" in path:
            raise OSError("GET https://h/x?X-Amz-Signature=topsecret: reset")
        return put(self, path, value, **kwargs)

    monkeypatch.setattr(type(store), "pipe_file", pipe_file)
    with OutputCopy(run, WHERE, keep=2) as copy:
        for step in (1, 2, 3):
            save(run, step)
            copy.on_save(None, None, None)
            copy._waiting.result()
        assert sum("goes on, and copies again after the next checkpoint" in line for line in said) == len(said) == 1
        lost = False
        save(run, 4)
        copy.on_save(None, None, None)
        copy._waiting.result()
        assert said[1:] == ["output_copy: store://b/x is complete again"]
        lost = True
        save(run, 5)
    assert re.search(r"is not completely in store://b/x .*the same command with --resume_from_checkpoint", said[2])
    assert "topsecret" not in "".join(said)
    assert {name.split("/")[3] for name in store.find("/b/x") if "checkpoint" in name} == {
        "checkpoint-3",
        "checkpoint-4",
    }
    assert not verify(run / "checkpoint-5")


def test_a_checkpoint_of_two_saves_is_never_a_mixture(store, said, tmp_path, monkeypatch):
    run, seen, put = tmp_path / "run", [], type(store).pipe_file
    save(run, 1)
    copied(run)

    def pipe_file(self, path, value, **kwargs):
        seen.append((path, self.exists(f"/b/x/checkpoint-1/{MANIFEST}")))
        return put(self, path, value, **kwargs)

    monkeypatch.setattr(type(store), "pipe_file", pipe_file)
    save(run, 1, seed=7)
    copied(run)
    during = [whole for path, whole in seen if "checkpoint-1" in path]
    assert during
    assert not any(during)
    assert find_checkpoint(config(tmp_path / "new")) == tmp_path / "new" / "checkpoint-1"
    assert checkpoint.load(tmp_path / "new" / "checkpoint-1")[0]["weights"]["w"].tolist() == [8.0, 8.0]


def test_nothing_of_this_machine_is_copied(store, said, tmp_path):
    run = tmp_path / "run"
    save(run, 1)
    for name in (
        ".diffalign.lock",
        ".diffalign-7-checkpoint-2/x",
        "cache/x",
        "earlier/checkpoint-9/x",
        "checkpoint-4/x",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    copied(run)
    assert {name.split("/")[3] for name in store.find("/b/x")} == {"checkpoint-1", "metrics.jsonl"}


def test_a_copy_that_is_there_is_not_sent_again(store, said, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save(run, 1)
    copied(run)
    monkeypatch.setattr(type(store), "pipe_file", lambda self, path, *_, **__: pytest.fail(path))
    (run / "metrics.jsonl").unlink()
    copied(run)


def test_a_folder_of_this_machine_is_a_place_too(said, tmp_path):
    save(tmp_path / "run", 1)
    copied(tmp_path / "run", str(tmp_path / "disk" / "x"))
    assert not verify(tmp_path / "disk" / "x" / "checkpoint-1")
    found = find_checkpoint(config(tmp_path / "new", copy=str(tmp_path / "disk" / "x")))
    assert found == tmp_path / "new" / "checkpoint-1"
