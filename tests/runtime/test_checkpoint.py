import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from diffalign.runtime import checkpoint, manifest
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


def test_everything_comes_back_bit_for_bit(tmp_path):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tied = torch.nn.Parameter(torch.randn(2, 2))
    groups = {
        "weights": {
            "bf16": torch.randn(3).bfloat16(), "half": torch.randn(2).half(), "double": torch.randn(2).double(),
            "zero_dim": torch.tensor(3.5), "int": torch.tensor([2**62]), "byte": torch.tensor([255], dtype=torch.uint8),
            "bool": torch.tensor([True, False]), "empty": torch.empty(0, 3),
            "nan": torch.tensor([torch.nan, torch.inf]),
            "transposed": base.T, "strided": base[:, ::2], "expanded": torch.tensor(1.0).expand(3),
            "tied": tied, "tied_too": tied, "view": tied.view(4), "whole": base, "part": base[1],
        },
        "nothing": {},
    }  # fmt: skip
    state = {"step": 3, "loss": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70, "nested": {"a": [1, None, True, "ü"]}, "": ""}
    path = checkpoint.save(tmp_path / "new" / "run", 3, groups, state, keep=None)
    assert path == tmp_path / "new" / "run" / "checkpoint-3"
    tensors, loaded = checkpoint.load(path)
    assert loaded == state
    assert tensors.keys() == groups.keys()
    for group, named in groups.items():
        assert tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            torch.testing.assert_close(tensors[group][name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert names(path.parent) == ["checkpoint-3"]


def test_the_manifest_lists_size_and_digest_and_files_are_as_readable_as_the_folder(tmp_path):
    path = write(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    assert (content["format"], content["step"]) == (manifest.FORMAT, 1)
    assert sorted(content["files"]) == ["state.json", "weights.safetensors"]
    for name, entry in content["files"].items():
        written = (path / name).read_bytes()
        assert entry == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.tensor(1)}, "state 'a' is not JSON"),
        ({"a": {1: 2}}, "state 'a' changes in JSON"),
        ({"a": (1, 2)}, "state 'a' changes in JSON"),
    ],
)
def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, 1, {}, state, keep=None)
    assert names(tmp_path) == []


def test_numbers_that_json_has_no_word_for_come_back(tmp_path):
    state = {"a": float("inf"), "b": {"c": [float("-inf"), 1.5]}, "nan": [float("nan")]}
    checkpoint.check_state(state)
    _, loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {}, state, keep=None))
    assert repr(loaded) == repr(state)


@pytest.mark.parametrize("group", ["", "../x", "a/b", ".hidden"])
def test_group_names_are_plain(tmp_path, group):
    with pytest.raises(ValueError, match="names a file"):
        checkpoint.save(tmp_path, 1, {group: {}}, {}, keep=None)


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_fewer_than_two_are_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="at least 2"):
        write(tmp_path, 1, keep=keep)


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_no_flipped_byte_is_accepted(tmp_path):
    path = write(tmp_path, 1)
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for position in range(0, size, 2) if file.name == "manifest.json" else range(0, size, 19):
            flip(file, position)
            problems = checkpoint.verify(path)
            assert problems, (file.name, position)
            assert file.name in problems[0] or file.name == "manifest.json"
            flip(file, position)
    assert checkpoint.verify(path) == []


DAMAGES = {
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "extend": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "delete": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["weights.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_or_refused_by_name(tmp_path, caplog, damage, file):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    DAMAGES[damage](path / file)
    with pytest.raises(CheckpointError, match=f"{file}.*Resume from another"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match=f"{file}.*sound checkpoints in .*: checkpoint-1. Pass one"):
        checkpoint.resolve(tmp_path, str(path))
    assert value_of(checkpoint.resolve(tmp_path, "latest")) == 1
    assert len(caplog.records) == 1
    assert file in caplog.text
    assert "checkpoint-2" in caplog.text


def test_an_unknown_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_check_file", lambda *_: None)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    path = write(tmp_path, 1)
    monkeypatch.setattr(manifest, "FORMAT", 1)
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        checkpoint.load(path)


# Which one ------------------------------------------------------------------------------------------------------------


def test_resolve(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert checkpoint.resolve(run, None) is None
    assert checkpoint.resolve(run, "latest") is None
    for step in (9, 10, 100):
        write(run, step)
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-7").write_text("a file")
    assert checkpoint.resolve(run, None) is None
    assert checkpoint.resolve(run, "latest") == run / "checkpoint-100"
    assert checkpoint.resolve(run, "checkpoint-9") == run / "checkpoint-9"
    assert checkpoint.resolve(tmp_path / "other", str(run / "checkpoint-9")) == run / "checkpoint-9"
    monkeypatch.chdir(run)
    assert checkpoint.resolve(run, "checkpoint-9/") == Path("checkpoint-9")
    for missing in ("checkpoint-11", str(tmp_path), "", "checkpoint-7"):
        with pytest.raises(
            CheckpointError, match=r"cannot resume: .*checkpoint-100, checkpoint-10, checkpoint-9\. Pass"
        ):
            checkpoint.resolve(run, missing)


def test_the_oldest_go_first(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep=3)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    write(tmp_path, 12, keep=2)
    assert names(tmp_path) == ["checkpoint-11", "checkpoint-12"]
    write(tmp_path, 13)
    assert len(names(tmp_path)) == 3


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    flip(tmp_path / "checkpoint-3" / "state.json", 5)
    write(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_what_was_just_saved_stays_though_others_have_higher_steps(tmp_path):
    for step in (20, 30, 40):
        write(tmp_path, step)
    write(tmp_path, 10, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-40"]


def test_sweep(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1.replaced")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2.replaced")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".diffalign-99-checkpoint-3")
    (tmp_path / "config.yaml").touch()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2.replaced", "config.yaml"]
    checkpoint.sweep(tmp_path / "missing")
