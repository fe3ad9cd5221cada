"""A store of objects in memory that can refuse, lose its connection, or lack its package, at an address of its own."""

from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Store(MemoryFileSystem):
    """``store://``: fails with ``error`` in calls of the names in ``failing``, and counts the files it has sent.

    Lists an empty object for each folder if ``marks``, as S3 does for folders that were made in its console: with a
    slash at the end, or without.
    """

    protocol = "store"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    failing: ClassVar = set()
    error: ClassVar = OSError("connection reset by peer")
    sent: ClassVar = []
    marks: ClassVar[str | None] = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("store://"))

    def _check(self, name):
        if name in self.failing:
            raise type(self.error)(*self.error.args)

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        found = super().find(path, detail=True)
        if self.marks is not None:
            folders = {key.rpartition("/")[0] for key in found} | {self._strip_protocol(path).rstrip("/")}
            found |= {f"{key}{self.marks}": {"name": key, "size": 0, "type": "file"} for key in folders}
        return found if detail else sorted(found)

    def info(self, path, **kwargs):
        self._check("info")
        return super().info(path, **kwargs)

    def get_file(self, path, target, **kwargs):
        self._check("get_file")
        self.sent.append(path)
        return super().get_file(path, target, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._check("pipe_file")
        return super().pipe_file(path, value, **kwargs)


def opened(monkeypatch, cache):
    """Return an empty store, with an empty cache of copies."""
    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("diffalign.remote.WAIT", 0)
    monkeypatch.setattr("diffalign.remote._current", set())
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("failing", set()), ("sent", []), ("marks", None)):
        monkeypatch.setattr(Store, name, value)
    monkeypatch.setattr(Store, "error", OSError("connection reset by peer"))
    return fsspec.filesystem("store")


def upload(store, folder, where):
    """Copy a local folder into the store."""
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"{where}/{path.relative_to(folder).as_posix()}", path.read_bytes())
