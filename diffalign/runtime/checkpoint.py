"""Checkpoints that are whole or absent: safetensors and JSON, nothing pickled.

    checkpoint-<step>/<group>.safetensors ...   tensors
                      state.json                everything else
                      ...                       what other programs read, such as a LoRA
                      manifest.json             size and SHA-256 of each file, written last

A save is staged in ``.diffalign-<pid>-checkpoint-<step>/`` and appears by one rename. A checkpoint that is saved again
moves aside as ``checkpoint-<step>.replaced`` for the moment between two renames; should the process die there, that
folder is found like any other checkpoint. Only folders that this module wrote are deleted: a symbolic link, a file or
the checkpoint of another program that has such a name stays, at most under another name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.atomic import keep_aside, remove, remove_staged, staged_path, unused
from diffalign.atomic import sync as _sync
from diffalign.runtime.manifest import GROUPS, MANIFEST, STATE, manifest_text, read_regular, verify
from diffalign.runtime.optimizer_state import flatten_optimizer, restore_optimizer

__all__ = ["STATE", "flatten_optimizer", "latest", "load", "resolve", "restore_optimizer", "save", "sweep", "verify"]

logger = logging.getLogger(__name__)

EARLIER = "earlier"  # folder that a fresh start moves the checkpoints of another run to
FLOAT = "__float__"  # the key of a number that JSON has no word for: NaN and the infinities
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
    """Write ``checkpoint-<step>/``, then remove all but the ``keep`` newest valid checkpoints.

    After an error the older checkpoints are unchanged.

    Args:
        output_dir: The run folder.
        step: Optimizer step.
        tensors: Group -> name -> tensor, a file per group; any dtype, layout or shared memory.
        state: JSON values; floats are restored exactly.
        keep: At least 2, so that a damaged checkpoint has a predecessor; None keeps all.
        export: Writes files for other programs into the folder, none in subfolders.

    Raises:
        ValueError: ``keep`` or a group name is invalid, or JSON cannot hold ``state`` exactly.
        CheckpointError: The files written do not verify.
        OSError: The disk refused them.
    """
    if keep is not None and keep < 2:
        raise ValueError(f"checkpoints_total_limit must be at least 2, got {keep}; leave it out to keep all")
    if bad := [name for name in tensors if not _PLAIN_NAME.fullmatch(name)]:
        raise ValueError(f"a group of tensors names a file, so {bad[0]!r} is refused: use letters, digits, - and _")
    text = _state_text({**state, GROUPS: sorted(tensors)})
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    staged = staged_path(final)
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


def check_state(state: Mapping[str, Any]) -> None:
    """Raise ValueError for a state that ``save`` could not write; asked before the first step."""
    _state_text(state)


def _state_text(state: Mapping[str, Any]) -> str:
    encoded = {name: _encoded(value) for name, value in state.items()}
    for name, value in encoded.items():
        try:
            exact = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"state {name!r} is not JSON ({error}): store tensors as tensors") from error
        if not exact:
            raise ValueError(f"state {name!r} changes in JSON: use text as keys and lists for tuples")
    return json.dumps(encoded, indent=1)


def _encoded(value: Any) -> Any:
    """Replace floats that JSON cannot hold by {FLOAT: text}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(value)}
    if isinstance(value, dict):
        return {name: _encoded(entry) for name, entry in value.items()}
    return [_encoded(entry) for entry in value] if isinstance(value, list) else value


def _decoded(value: dict[str, Any]) -> Any:
    return float(value[FLOAT]) if value.keys() == {FLOAT} else value


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


def _aside(final: Path) -> Path:
    return final.with_name(final.name + ".replaced")


def _publish(staged: Path, final: Path) -> None:
    aside = _aside(final)
    for path in (final, aside):
        if os.path.lexists(path) and not _is_ours(path):
            logger.warning("%s is not a checkpoint of diffalign: it is now %s", path, keep_aside(path))
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


def _is_ours(path: Path) -> bool:
    """Return whether this module wrote a folder: not links, nor checkpoint-N of other programs."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / MANIFEST).exists() or (path / STATE).exists() or not any(path.iterdir())


def _remove(folder: Path) -> None:
    """Rename a folder out of sight before its files are deleted, so that no half of it is ever found."""
    hidden = folder if folder.name.startswith(".diffalign-") else staged_path(folder)
    if hidden != folder and folder.exists():
        remove(hidden)
        os.rename(folder, hidden)
    remove(hidden)


def _prune(saved: Path, keep: int) -> None:
    """Remove old checkpoints, but not ``saved``; damaged ones do not count as kept, and go with the old ones."""
    others = [path for path in _newest_first(saved.parent) if path != saved and _is_ours(path)]
    kept = 1
    for path in others:
        if kept >= keep:
            _remove(path)
        elif not verify(path):
            kept += 1


def _newest_first(output_dir: Path) -> Iterator[Path]:
    """Yield checkpoint folders, valid or not; of two of the same step, the replaced one comes last."""
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    found = [(path, match) for path in folders if (match := _FOLDER.fullmatch(path.name))]
    for path, _ in sorted(found, key=lambda item: (int(item[1][1]), item[1][2] is None), reverse=True):
        yield path


def has_checkpoints(output_dir: Path) -> bool:
    """Return whether a folder holds checkpoints of this package, valid or not."""
    return any(map(_is_ours, _newest_first(Path(output_dir))))


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the (tensors, state) that were passed to ``save``, on the CPU.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
    """
    if problems := verify(path):
        raise CheckpointError(f"{_joined(problems)}. Resume from another checkpoint, or pass 'latest'")
    try:
        state = json.loads(read_regular(Path(path) / STATE), object_hook=_decoded)
        groups = {name: load_file(Path(path) / f"{name}.safetensors") for name in state.pop(GROUPS)}
    except Exception as error:  # the checksums are right, so this never was a checkpoint
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{path} is no checkpoint ({problem}). Resume from another one, or 'latest'") from error
    return groups, state


def recorded_config(path: Path) -> dict[str, Any]:
    """Return the configuration of the run that wrote a valid checkpoint, as plain values; empty if it has none."""
    try:
        found = json.loads(read_regular(Path(path) / STATE), object_hook=_decoded)["origin"]["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _joined(problems: Sequence[str]) -> str:
    """Join the first problems to one line."""
    rest = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + rest


def latest(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None; a warning names each damaged one that is skipped."""
    for path in _newest_first(Path(output_dir)):
        if not (problems := verify(path)):
            return path
        logger.warning("skipping %s: %s", path.name, _joined(problems))
    return None


def resolve(output_dir: Path, resume: str | None) -> Path | None:
    """Find the checkpoint that ``--resume_from_checkpoint`` names.

    Args:
        output_dir: The run folder.
        resume: None, ``latest``, a path, or the name of a folder in ``output_dir``.

    Returns:
        Its path; None for a fresh start, as when ``latest`` finds none.

    Raises:
        CheckpointError: The path is missing or damaged; the message lists the valid checkpoints.
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
        raise CheckpointError(f"cannot resume: {_joined(problems)}; {exist}. Pass one of these, or 'latest'")
    return path


def put_aside(output_dir: Path) -> Path | None:
    """Move all checkpoints to a new folder, so that ``latest`` is never one of another run.

    Returns:
        The folder, ``earlier`` or the first free one of ``earlier-2`` and so on; None without checkpoints.
    """
    found = [path for path in _newest_first(Path(output_dir)) if (path / MANIFEST).exists() or (path / STATE).exists()]
    if not found:
        return None
    folder = unused(Path(output_dir) / EARLIER)
    folder.mkdir()
    for path in found:
        target = os.path.realpath(path) if path.is_symlink() else None
        os.rename(path, folder / path.name)
        if target is not None and not os.path.isabs(os.readlink(folder / path.name)):
            (folder / path.name).unlink()  # a relative link would point elsewhere from here
            os.symlink(target, folder / path.name)
    return folder


def sweep(output_dir: Path) -> None:
    """Remove what interrupted saves left behind; call it once at start, by the only process that saves."""
    remove_staged(Path(output_dir))
    for path in _newest_first(Path(output_dir)):
        if path.suffix == ".replaced" and _is_ours(path) and not verify(path.with_suffix("")):
            _remove(path)
