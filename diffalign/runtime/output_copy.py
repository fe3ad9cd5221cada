"""Copy a run folder to an fsspec address while it trains, and fetch a run from there to resume it.

    output_copy: s3://bucket/runs/x      # or the path of a folder, such as one on another disk

After each checkpoint and at the end, what is new or changed in the run folder is copied in the background. A checkpoint
gets its manifest last, so that the copy of one is complete or not found; checkpoints beyond ``checkpoints_total_limit``
are removed there too. A copy that fails is a warning, once, and is tried again after the next checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from diffalign import remote
from diffalign.atomic import STAGED, remove, staged_path
from diffalign.log import get_logger
from diffalign.runtime import checkpoint
from diffalign.runtime.callbacks import TrainerCallback, TrainerControl, TrainerState
from diffalign.runtime.checkpoint import CheckpointError
from diffalign.runtime.lock import LOCK
from diffalign.runtime.manifest import MANIFEST, verify

logger = get_logger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
NOT_COPIED = re.compile(rf"cache|earlier(-\d+)?|{re.escape(LOCK)}|checkpoint-\d+\.replaced|{STAGED.pattern}")
AT_ONCE = 64 << 20  # bytes; smaller files are read first, since logs grow while they are copied
OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
PROBE = ".diffalign-probe"
State = tuple[int, int]  # size and modification time of a file


class Store:
    """A run folder at an address, or in a folder of this machine."""

    def __init__(self, target: str) -> None:
        found = remote.address(target)
        self.name = found or str(Path(target).absolute())
        self.fs, self.root = remote.filesystem(self.name)

    def path(self, name: str) -> str:
        """Return the file system's name of a file of the run."""
        return f"{self.root.rstrip('/')}/{name}"

    def make_folder(self, path: str) -> None:
        """Create a folder where there are such; stores of objects would create a bucket instead."""
        if self.name.partition("://")[0] not in OBJECTS:
            self.fs.makedirs(path, exist_ok=True)

    def put(self, file: Path, name: str) -> None:
        """Copy a file there."""
        self.make_folder(self.path(name).rpartition("/")[0])
        if file.stat().st_size <= AT_ONCE:
            self.fs.pipe_file(self.path(name), file.read_bytes())
        else:
            self.fs.put_file(str(file), self.path(name))

    def files(self, folder: str = "") -> list[str]:
        """List all files of a run or of a folder in it, by their names in the run."""
        self.fs.invalidate_cache()
        base = self.path(folder).rstrip("/")
        found = remote.listed(self.fs, base) if self.fs.exists(base) else {}
        return sorted(name.lstrip("/").removeprefix(self.root.strip("/")).lstrip("/") for name in found)

    def checkpoints(self) -> list[str]:
        """List the complete checkpoints, the newest first."""
        found = [name.split("/")[0] for name in self.files() if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")]
        return sorted(filter(CHECKPOINT.fullmatch, found), key=step_of, reverse=True)

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint, the manifest first, so that a part of it is never found."""
        self.fs.rm_file(self.path(f"{name}/{MANIFEST}"))
        self.fs.rm(self.path(name), recursive=True)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file from there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self.path(name), str(target))


def step_of(name: str) -> int:
    """Return the step of a checkpoint's name."""
    return int(name.removeprefix("checkpoint-"))


def check_target(config: Any) -> None:
    """Refuse an ``output_copy`` that cannot be written, or that holds the checkpoints of another run.

    Raises:
        ValueError: Says which, and what to try.
    """
    if config.output_copy is None:
        return
    where = remote.shown(config.output_copy)
    try:
        store = Store(config.output_copy)
        store.make_folder(store.root)
        store.fs.pipe_file(store.path(PROBE), b"can this be written?")
        store.fs.rm_file(store.path(PROBE))
        there = store.checkpoints()
    except remote.RemoteError as error:
        raise ValueError(f"output_copy {error}") from None
    except Exception as error:  # of any of fsspec's stores
        raise ValueError(f"output_copy {where} cannot be written: {remote.explained(store.name, error)}") from None
    if there and not config.resume_from_checkpoint:
        raise ValueError(
            f"output_copy {where} holds {there[0]} of a run: go on with it by --resume_from_checkpoint latest, or name "
            "another place"
        )


class OutputCopy(TrainerCallback):
    """Copy the run folder after each checkpoint and, as a context, at the end of the training, however it ends.

    Args:
        folder: The run folder.
        target: Address or folder of the copy; None copies nothing.
        keep: Number of checkpoints to keep there.
    """

    def __init__(self, folder: Path, target: str | None, keep: int) -> None:
        self.folder, self.target, self.keep = folder, target, keep
        self.copied: dict[str, State] = {}
        self.failing = False
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: Future[None] | None = None

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Copy in the background, unless a copy waits to begin, which will include this checkpoint."""
        if self._pool is not None and (self._waiting is None or self._waiting.running() or self._waiting.done()):
            self._waiting = self._pool.submit(self._try)

    def __enter__(self) -> OutputCopy:
        if self.target is not None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="output-copy")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        if self.folder.is_dir():
            self._try(last=True)

    def _try(self, last: bool = False) -> None:
        assert self.target is not None
        where = remote.shown(self.target)
        try:
            self._copy()
        except Exception as error:  # of any store, its client, or the disk: the run itself is complete
            why = remote.reason(error)
            if last:
                logger.warning(
                    f"output_copy: {self.folder} is not completely in {where} ({why}); the run itself is complete: the "
                    "same command with --resume_from_checkpoint latest copies the rest"
                )
            elif not self.failing:
                logger.warning(
                    f"output_copy: cannot copy to {where} ({why}): the training goes on, and copies again after the "
                    "next checkpoint"
                )
            self.failing = True
            return
        if self.failing or last:
            logger.info(f"copy        {where}" if last else f"output_copy: {where} is complete again")
        self.failing = False

    def _copy(self) -> None:
        store = Store(str(self.target))
        for folder, names in groups(self.folder):
            changed = [name for name in names if self._state(name) != self.copied.get(name)]
            if not changed or (folder is not None and self._is_there(store, folder, names)):
                continue
            if folder is not None and store.fs.exists(store.path(f"{folder}/{MANIFEST}")):
                store.fs.rm_file(store.path(f"{folder}/{MANIFEST}"))
            for name in changed:
                self._put(store, name)
        for name in store.checkpoints()[self.keep :]:
            if not (self.folder / name).is_dir():
                store.remove_checkpoint(name)

    def _put(self, store: Store, name: str) -> None:
        with suppress(FileNotFoundError):  # an old checkpoint was removed meanwhile
            state = self._state(name)
            if state is not None:
                store.put(self.folder / name, name)
                self.copied[name] = state

    def _state(self, name: str) -> State | None:
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return None
        return found.st_size, found.st_mtime_ns

    def _is_there(self, store: Store, folder: str, names: Sequence[str]) -> bool:
        """Return whether a checkpoint is there already, as after a resume: by its manifest, which has checksums."""
        name = f"{folder}/{MANIFEST}"
        if name in self.copied or not store.fs.exists(store.path(name)):
            return False
        if store.fs.cat_file(store.path(name)) != (self.folder / name).read_bytes():
            return False
        self.copied |= {one: state for one in names if (state := self._state(one)) is not None}
        return True


def groups(folder: Path) -> list[tuple[str | None, list[str]]]:
    """List the files of a run to copy: (None, all others), then each complete checkpoint, its manifest last.

    The logs go first, so that those that are there have all rows that a checkpoint there counts.
    """
    others: list[str] = []
    checkpoints: list[tuple[str | None, list[str]]] = []
    for entry in sorted(folder.iterdir()):
        if NOT_COPIED.fullmatch(entry.name):
            continue
        inside = sorted(path for path in entry.rglob("*") if path.is_file()) if entry.is_dir() else [entry]
        names = [path.relative_to(folder).as_posix() for path in inside if not STAGED.fullmatch(path.name)]
        if CHECKPOINT.fullmatch(entry.name) is None:
            others += names
        elif (entry / MANIFEST).is_file():
            checkpoints.append((entry.name, sorted(names, key=lambda name: name.endswith(f"/{MANIFEST}"))))
    return [(None, others), *checkpoints]


# Resume ----------------------------------------------------------------------------------------------------------


def find_checkpoint(config: Any) -> Path | None:
    """Return the checkpoint to resume from as ``checkpoint.resolve`` does; one of an address is fetched first.

    ``latest`` with ``output_copy`` is the newest of both places. The logs and all else that the run had written are
    fetched with the checkpoint, so that the run goes on as if its folder had been here.

    Raises:
        CheckpointError: There is none at the address, it is damaged, or the run folder has checkpoints of another run.
    """
    resume = config.resume_from_checkpoint
    try:
        named = remote.address(resume) if resume else None
        if named is not None:
            return _fetch_named(named, config)
        if resume == "latest" and config.output_copy is not None:
            here, store = checkpoint.latest(config.output_dir), Store(config.output_copy)
            there = [name for name in store.checkpoints() if here is None or step_of(name) > step_of(here.name)]
            return _fetch_newest(store, there, config.output_dir) or here
    except remote.RemoteError as error:
        raise CheckpointError(f"cannot resume: {error}") from None
    except (CheckpointError, KeyboardInterrupt):
        raise
    except Exception as error:  # of any of fsspec's stores
        where = remote.explained(named or config.output_copy, error)
        raise CheckpointError(f"cannot resume: {where}") from None
    return checkpoint.resolve(config.output_dir, resume)


def _fetch_named(named: str, config: Any) -> Path:
    """Fetch the checkpoint that an address names, or the newest of the run that it names."""
    run, _, last = named.rpartition("/")
    store = Store(run if CHECKPOINT.fullmatch(last) else named)
    wanted = store.checkpoints()
    if CHECKPOINT.fullmatch(last):
        wanted = [name for name in wanted if name == last]
    if not wanted:
        raise CheckpointError(f"cannot resume: there is no complete checkpoint at {named}: check the address")
    own = checkpoint.latest(config.output_dir)
    if own is not None and not _is_copy(store, own):
        raise CheckpointError(
            f"cannot resume {config.output_dir} from {named}: it has {own.name}, which is not from there; pass "
            "'latest', or choose another output_dir"
        )
    if (found := _fetch_newest(store, wanted, config.output_dir)) is None:
        raise CheckpointError(f"cannot resume: no checkpoint at {named} is undamaged: copy the run again")
    return found


def _is_copy(store: Store, own: Path) -> bool:
    name = store.path(f"{own.name}/{MANIFEST}")
    return store.fs.exists(name) and store.fs.cat_file(name) == (own / MANIFEST).read_bytes()


def _fetch_newest(store: Store, names: Sequence[str], folder: Path) -> Path | None:
    """Fetch the first of ``names`` that is undamaged, and the files of the run besides its checkpoints."""
    for name in names:
        target = folder / name
        if target.is_dir() and not verify(target) and _is_copy(store, target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        staged = staged_path(target)
        remove(staged)
        for file in store.files(name):
            store.fetch(file, staged / file.removeprefix(f"{name}/"))
        if problems := verify(staged):
            logger.warning(f"skipping {name} of {remote.shown(store.name)}: {problems[0]}")
            remove(staged)
            continue
        for file in store.files():
            top = file.split("/")[0]
            if not CHECKPOINT.fullmatch(top) and not NOT_COPIED.fullmatch(top) and ".." not in file.split("/"):
                store.fetch(file, folder / file)
        remove(target)
        os.rename(staged, target)
        logger.info(f"{name} comes from {remote.shown(store.name)}")
        return target
    return None
