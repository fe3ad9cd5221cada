"""Fingerprints notice what changed, whatever its size, and what did not."""

import os

import pytest

from diffalign.runtime import fingerprint as module
from diffalign.runtime.fingerprint import MODEL_FILES, fingerprint


def test_a_small_file_is_hashed_whole_and_its_time_does_not_count(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    before = fingerprint(path)
    os.utime(path, (1, 1))
    assert fingerprint(path) == before
    path.write_bytes(b"x" * 999 + b"y")
    assert fingerprint(path)["content"] != before["content"]


def test_a_large_file_is_sampled_and_its_time_is_kept_apart(tmp_path, monkeypatch):
    for name, value in {"WHOLE": 100, "BLOCKS": 4, "BLOCK": 10}.items():
        monkeypatch.setattr(module, name, value)
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    os.utime(path, (1, 1))
    before = fingerprint(path)
    for place in (0, 333, 999):
        path.write_bytes(bytes(place) + b"y" + bytes(999 - place))
        assert fingerprint(path)["content"] != before["content"], place
    path.write_bytes(bytes(1001))
    assert fingerprint(path)["content"] != before["content"]
    path.write_bytes(bytes(1000))
    assert fingerprint(path)["content"] == before["content"]
    assert fingerprint(path)["time"] != before["time"]


def test_a_folder_is_its_names_sizes_and_contents(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path, MODEL_FILES)
    for name in ("README.md", ".hidden.json", "picture.png"):
        (tmp_path / name).write_text("of no matter to a model")
    assert fingerprint(tmp_path, MODEL_FILES) == before
    assert fingerprint(tmp_path) != before
    (tmp_path / "unet" / "w.safetensors").rename(tmp_path / "unet" / "v.safetensors")
    assert fingerprint(tmp_path, MODEL_FILES) != before


@pytest.mark.parametrize("make", [lambda p: None, os.mkfifo, lambda p: p.symlink_to(p.name)])
def test_what_cannot_be_read_has_none_and_takes_no_time(tmp_path, make):
    make(tmp_path / "x")
    assert fingerprint(tmp_path / "x") is None
    assert fingerprint(tmp_path) is not None
