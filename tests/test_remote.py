"""Addresses of stores: one form, no credentials, current copies, and a sentence for each way a store fails."""

import warnings
from pathlib import Path

import pytest

from diffalign import remote
from diffalign.files import read_bytes, shorten
from diffalign.remote import RemoteError, Unreachable, address, address_of, copy_path, local, mapped, problem, shown
from tests.store import opened


@pytest.fixture
def store(monkeypatch, tmp_path):
    return opened(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize("text", ["s3://b/x/y.jsonl", "hf://datasets/me/x@main/y.csv", "gs://b/x", "http://h:80/x.csv"])
def test_an_address_survives_a_path_object_and_the_cache(text, store):
    assert address(text) == address(Path(text)) == address(f"{text}/") == text
    assert shown(Path(text)) == shown(text) == text
    assert address_of(copy_path(text)) == text
    assert shorten(copy_path(text)) == text


@pytest.mark.parametrize(
    "text", ["a/b.jsonl", "/a/b", "owner/name", "C:/x.csv", "own.py:Class", "geneval?split=test", ""]
)
def test_other_sources_are_no_addresses(text, store):
    assert address(text) is None
    assert mapped(text) == local(text) == Path(text)


def test_a_local_address_is_a_path(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    assert local(f"file://{tmp_path}/x.txt") == local(Path(f"file://{tmp_path}/x.txt")) == tmp_path / "x.txt"
    assert problem(f"file://{tmp_path}/x.txt") is None
    assert "there is no file" in problem(f"file://{tmp_path}/y.txt")


@pytest.mark.parametrize(
    "text",
    [
        "s3://KEY:topsecret@b/x.jsonl",
        "https://b.s3.amazonaws.com/x.jsonl?X-Amz-Credential=A&X-Amz-Signature=topsecret",
        "https://h/x.jsonl?token=topsecret",
        "https://h/x.jsonl?limit=3&access_key=topsecret",
        "abfs://b/x.csv?sig=topsecret",
    ],
)
def test_an_address_with_credentials_is_refused_without_showing_them(text):
    with pytest.raises(RemoteError, match="holds credentials") as raised:
        address(text)
    assert "topsecret" not in str(raised.value)


@pytest.mark.parametrize("text", ["s3://b/../x", "s3://b//x", "zip://a.png::s3://b/x.zip", "s3://b/./x"])
def test_an_address_that_could_leave_its_place_is_refused(text):
    with pytest.raises(RemoteError, match="no plain address"):
        address(text)


def test_a_copy_is_made_once_and_again_when_the_object_changes(store):
    store.pipe_file("/b/x.txt", b"one")
    path = local("store://b/x.txt")
    assert path.read_bytes() == b"one"
    local("store://b/x.txt")
    assert store.sent == ["/b/x.txt"]
    store.pipe_file("/b/x.txt", b"two")
    assert local("store://b/x.txt").read_bytes() == b"two"
    path.unlink()  # someone emptied the cache
    assert read_bytes(path) == b"two"


@pytest.mark.parametrize("marks", [None, "/", ""])
def test_a_folder_is_copied_whole_and_forgets_what_is_gone(marks, store):
    type(store).marks = marks
    for name in ("a/0.txt", "a/b/1.txt", "ab.txt"):
        store.pipe_file(f"/b/{name}", name.encode())
    folder = local("store://b/a")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.txt")) == ["0.txt", "b/1.txt"]
    store.rm("/b/a/0.txt")
    local("store://b/a/")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["1.txt"]
    assert len(store.sent) == 2


FAULTS = {
    "nothing": (FileNotFoundError("/b/x"), RemoteError, "there is nothing at store://b/x.txt: check bucket and path"),
    "refused": (PermissionError("403 Forbidden"), RemoteError, "no access to store://b/x.txt .*check the credentials"),
    "no keys": (RuntimeError("Unable to locate credentials"), RemoteError, "no access to .*AWS_PROFILE"),
    "drop": (OSError("connection reset by peer"), Unreachable, "store://b/x.txt cannot be reached .*connection reset"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_one_sentence_that_ends_with_what_to_try(kind, store, monkeypatch):
    error, raised, message = FAULTS[kind]
    store.pipe_file("/b/x.txt", b"one")
    type(store).error, type(store).failing = error, {"info"}
    with pytest.raises(raised, match=message):
        remote.ensure(copy_path("store://b/x.txt"))
    with pytest.raises(RemoteError, match=message):  # the user corrects it before the training
        local("store://b/x.txt")
    assert problem("store://b/x.txt") is not None


def test_no_secret_of_an_error_is_shown(store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecretvalue")
    type(store).failing = {"info"}
    type(store).error = OSError("GET https://me:pw99@h/x?X-Amz-Signature=abcdef99 with topsecretvalue: reset")
    found = problem("store://b/x.txt")
    assert not any(secret in found for secret in ("topsecret", "pw99", "abcdef99"))


def test_a_copy_serves_while_the_store_does_not_answer(store, monkeypatch):
    store.pipe_file("/b/x.txt", b"one")
    local("store://b/x.txt")
    monkeypatch.setattr("diffalign.remote._current", set())
    type(store).failing = {"info"}
    with pytest.warns(UserWarning, match="cannot be reached .*; its copy in the cache is used"):
        assert read_bytes(copy_path("store://b/x.txt")) == b"one"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_bytes(copy_path("store://b/x.txt")) == b"one"  # said once


def test_a_short_download_is_tried_again_and_never_taken_for_whole(store, monkeypatch):
    store.pipe_file("/b/x.txt", b"whole")
    whole, times = type(store).get_file, []

    def cut(self, path, target, **kwargs):
        times.append(path)
        Path(target).write_bytes(b"wh") if len(times) < 3 else whole(self, path, target, **kwargs)

    monkeypatch.setattr(type(store), "get_file", cut)
    assert local("store://b/x.txt").read_bytes() == b"whole"
    monkeypatch.setattr(type(store), "get_file", lambda self, path, target: Path(target).write_bytes(b"wh"))
    store.pipe_file("/b/y.txt", b"whole")
    with pytest.raises(RemoteError, match="2 of 5 bytes came"):
        local("store://b/y.txt")
    assert not copy_path("store://b/y.txt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("s3://b/x", "pip install s3fs"), ("gs://b/x", "pip install gcsfs"), ("s4://b/x", "unknown scheme s4://")],
)
def test_a_missing_package_is_named(text, message, monkeypatch):
    def url_to_fs(found):
        raise ImportError("Install it") if not found.startswith("s4") else ValueError("Protocol not known: s4")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    assert message in problem(text)
