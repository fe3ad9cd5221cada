"""Files appear whole, with the permissions of their folder's owner, and nothing else is touched."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fails_after(path, text):
    path.write_text(text)
    raise OSError("full")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says_whatever_wrote_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic.replacing(tmp_path / "a.safetensors") as staged:
            save_file({"w": torch.zeros(1)}, staged)  # through mkstemp: private
        atomic.write_text(tmp_path / "b.txt", "text\n")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_file_that_is_replaced_keeps_its_mode_and_an_error_changes_nothing(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "one")
    path.chmod(0o640)
    atomic.write_text(path, "two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(OSError, match="full"), atomic.replacing(path) as staged:
        fails_after(staged, "th")
    assert path.read_text() == "two"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to("theirs")
    atomic.write_text(tmp_path / "link", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "link").read_text() == "ours"


def test_a_folder_is_replaced_as_one(tmp_path):
    place = tmp_path / "unet"
    for text in ("one", "two"):
        with atomic.replacing_folder(place) as staged:
            (staged / text).write_text(text)
        assert names(place) == [text]
    with pytest.raises(OSError, match="full"), atomic.replacing_folder(place) as staged:
        fails_after(staged / "three", "three")
    assert names(place) == ["two"]
    assert names(tmp_path) == ["unet"]


def test_only_staged_files_are_removed(tmp_path):
    for name in (".diffalign-12-a.png", ".diffalign-x", ".tmp-1-2", "diffalign-12-a"):
        (tmp_path / name).write_text("")
    (tmp_path / ".diffalign-7-checkpoint-3").mkdir()
    atomic.remove_staged(tmp_path)
    assert names(tmp_path) == [".diffalign-x", ".tmp-1-2", "diffalign-12-a"]


def test_what_is_kept_aside_never_replaces_what_was_kept_before(tmp_path):
    for number in range(3):
        (tmp_path / "a").write_text(str(number))
        atomic.keep_aside(tmp_path / "a")
    assert [(tmp_path / name).read_text() for name in ("a.old", "a.old-2", "a.old-3")] == ["0", "1", "2"]
    assert atomic.keep_aside(tmp_path / "a") is None


def test_no_product_is_written_but_through_this_module():
    """A file that is opened to write in place can be torn by a full disk, or by a kill."""
    allowed = {
        "atomic.py",
        "models/tensor_cache.py",
        "runtime/tracking.py",
        "runtime/watchdog.py",
        "runtime/guardian.py",
    }
    allowed |= {"runtime/checkpoint.py", "runtime/lock.py", "commands/doctor/probes.py"}
    package = Path(atomic.__file__).parent
    writes = (".write_text(", ".write_bytes(", '.open("w"', "savefig(Path", ".save(Path(", "save_file(")
    found = {}
    for path in package.rglob("*.py"):
        for line in path.read_text().splitlines():
            direct = any(word in line for word in writes) and "staged" not in line and "import" not in line
            if direct and str(path.relative_to(package)) not in allowed:
                found.setdefault(str(path.relative_to(package)), []).append(line.strip())
    assert not found
