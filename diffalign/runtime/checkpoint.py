"""Checkpoints that are whole or absent: safetensors and JSON, nothing pickled.

    checkpoint-<step>/<group>.safetensors ...   tensors
                      state.json                everything else
                      ...                       what other programs read, such as a LoRA
                      manifest.json             size and SHA-256 of each file, written last

A save is staged in ``.tmp-<step>-<pid>/`` and appears by one rename. A checkpoint that is saved again moves aside as
``checkpoint-<step>.replaced`` for the moment between two renames; should the process die there, that folder is found
like any other checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.runtime.manifest import MANIFEST, manifest_text, verify
from diffalign.runtime.optimizer_state import flatten_optimizer, restore_optimizer

__all__ = ["flatten_optimizer", "latest", "load", "resolve", "restore_optimizer", "save", "sweep", "verify"]

logger = logging.getLogger(__name__)

STATE = "state.json"
FORMER = "former"  # the folder that a fresh start moves the checkpoints of another run to
GROUPS = "tensor_groups"  # the key of STATE that lists the groups of tensors; other files are exports
_FOLDER = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_PLAIN_NAME = re.compile(r"\w[\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint that is missing or damaged; the message names the file and what to do."""


def save(
    output_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int | None,
    export: Callable[[Path], object] | None = None,
) -> Path:
    """Writes ``checkpoint-<step>/`` and then removes the oldest ones beyond the ``keep`` newest sound ones.

    tensors: group -> name -> tensor, a file per group; any dtype, layout or shared memory. state: JSON values; floats
    come back exactly. export: writes files for other programs into the folder, none in subfolders. keep: at least 2, so
    that a checkpoint that turns out damaged has a predecessor; None keeps all.
    ValueError: keep, a group name, a state that JSON cannot hold exactly. CheckpointError: what was written does not
    verify. OSError: the disk. After any of them the older checkpoints are as they were.
    """
    if keep is not None and keep < 2:
        raise ValueError(f"checkpoints_total_limit must be at least 2, got {keep}; leave it out to keep all")
    if bad := [name for name in tensors if not _PLAIN_NAME.fullmatch(name)]:
        raise ValueError(f"a group of tensors names a file, so {bad[0]!r} is refused: use letters, digits, - and _")
    text = _state_text({**state, GROUPS: sorted(tensors)})
    output_dir = Path(output_dir)
    staged, final = output_dir / f".tmp-{step}-{os.getpid()}", output_dir / f"checkpoint-{step}"
    _remove(staged)
    try:
        _stage(staged, tensors, text, step, export)
        _publish(staged, final)
    except SafetensorError as error:
        _remove(staged)
        raise OSError(f"{staged}: {error}") from error  # what it says of a full disk
    except Exception:
        _remove(staged)
        raise
    if problems := verify(final):
        raise CheckpointError(f"{final} was damaged while it was written ({problems[0]}): check the disk")
    try:
        _remove(_aside(final))
        if keep is not None:
            _prune(final, keep)
    except OSError as error:  # The new checkpoint is safe; too many old ones are no reason to stop a training.
        logger.warning("could not remove old checkpoints in %s: %s", output_dir, error)
    return final


def _state_text(state: Mapping[str, Any]) -> str:
    for name, value in state.items():
        try:
            exact = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError) as error:
            raise ValueError(f"state {name!r} is not JSON ({error}): store tensors as tensors, NaN as None") from error
        if not exact:
            raise ValueError(f"state {name!r} changes in JSON: use text as keys and lists for tuples")
    return json.dumps(dict(state), indent=1)


def _stage(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state_text: str,
    step: int,
    export: Callable[[Path], object] | None,
) -> None:
    folder.mkdir(parents=True)
    if export is not None:
        export(folder)
        for path in folder.iterdir():
            path.chmod(folder.stat().st_mode & 0o666)
            _sync(path)
    for group, named in tensors.items():
        path = folder / f"{group}.safetensors"
        save_file(_separate(named), path)
        # safetensors makes files private; the checkpoint is as readable as the folder that holds it.
        path.chmod(folder.stat().st_mode & 0o666)
        _sync(path)
    _write(folder / STATE, state_text)
    _write(folder / MANIFEST, manifest_text(folder, step))
    _sync(folder)


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors demands."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in named.items():
        tensor = tensor.detach().to("cpu").contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(final: Path) -> Path:
    return final.with_name(final.name + ".replaced")


def _publish(staged: Path, final: Path) -> None:
    aside = _aside(final)
    if aside.exists() and final.exists() and verify(final):
        _remove(final)  # The one that an interrupted save put aside may be sound: it stays instead.
    if replaces := final.exists():
        _remove(aside)
        os.rename(final, aside)
    try:
        os.rename(staged, final)
    except OSError:
        if replaces:
            os.rename(aside, final)
        raise
    _sync(final.parent)


def _remove(folder: Path) -> None:
    """Takes a folder out of sight by one rename before its files go, so that no half of it is ever found."""
    if not folder.exists():
        return
    if not folder.name.startswith(".tmp-"):
        hidden = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        _remove(hidden)
        os.rename(folder, hidden)
        folder = hidden
    shutil.rmtree(folder)


def _prune(saved: Path, keep: int) -> None:
    """Never removes ``saved``; damaged checkpoints do not count as kept, and go with the old ones."""
    others = [path for path in _newest_first(saved.parent) if path != saved]
    kept = 1
    for path in others:
        if kept >= keep:
            _remove(path)
        elif not verify(path):
            kept += 1


def _newest_first(output_dir: Path) -> Iterator[Path]:
    """Checkpoint folders, sound or not; of the same step, the one put aside comes last."""
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    found = [(path, match) for path in folders if (match := _FOLDER.fullmatch(path.name))]
    for path, _ in sorted(found, key=lambda item: (int(item[1][1]), item[1][2] is None), reverse=True):
        yield path


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, state) as they were given to ``save``, on the CPU. CheckpointError: missing or damaged."""
    if problems := verify(path):
        raise CheckpointError(f"{'; '.join(problems)}. Resume from another checkpoint, or pass 'latest'")
    state = json.loads((Path(path) / STATE).read_text(encoding="utf-8"))
    groups = {name: load_file(Path(path) / f"{name}.safetensors") for name in state.pop(GROUPS)}
    return groups, state


def latest(output_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; a warning names each damaged one that is passed over."""
    for path in _newest_first(Path(output_dir)):
        if not (problems := verify(path)):
            return path
        logger.warning("skipping %s: %s", path.name, "; ".join(problems))
    return None


def resolve(output_dir: Path, resume: str | None) -> Path | None:
    """What ``--resume_from_checkpoint`` means: None, ``latest``, a path, or the name of a folder in ``output_dir``.

    None: a fresh start, also where ``latest`` finds nothing; the caller says so. CheckpointError: a path that is
    missing or damaged; the message lists what exists.
    """
    if resume is None:
        return None
    if resume == "latest":
        return latest(output_dir)
    inside = Path(output_dir) / resume
    path = inside if inside.is_dir() and not Path(resume).is_dir() else Path(resume)
    problems = verify(path) if path.is_dir() else [f"{path} does not exist"]
    if problems:
        sound = [folder.name for folder in _newest_first(Path(output_dir)) if not verify(folder)]
        exist = f"sound checkpoints in {output_dir}: {', '.join(sound) or 'none'}"
        raise CheckpointError(f"cannot resume: {'; '.join(problems)}; {exist}. Pass one of these, or 'latest'")
    return path


def put_aside(output_dir: Path) -> bool:
    """Moves all checkpoints to ``FORMER``, so that ``latest`` is never one of another run; whether there were any."""
    found = list(_newest_first(Path(output_dir)))
    for path in found:
        (path.parent / FORMER).mkdir(exist_ok=True)
        _remove(path.parent / FORMER / path.name)
        os.rename(path, path.parent / FORMER / path.name)
    return bool(found)


def sweep(output_dir: Path) -> None:
    """Removes what interrupted saves left behind; call it once at start, by the only process that saves."""
    for path in Path(output_dir).glob(".tmp-*"):
        _remove(path) if path.is_dir() else path.unlink()
    for path in _newest_first(Path(output_dir)):
        if path.suffix == ".replaced" and not verify(path.with_suffix("")):
            _remove(path)
