"""Log metrics to ``metrics.jsonl``, and to accelerate's trackers if the configuration names some."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffalign.atomic import keep_aside, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE = "time/save"  # seconds to write a checkpoint; such rows are not among those that a checkpoint counts
TRACKERS = ("tensorboard", "wandb", "trackio")
Captioned = tuple[Image.Image, str]
Pictures = Mapping[str, Sequence[Captioned]]


def _strict(value: Any) -> Any:
    """Convert to strict JSON: NaN becomes null and infinity text, because neither is a JSON number."""
    if hasattr(value, "tolist"):  # A number or an array of torch or numpy.
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _strict(entry) for name, entry in value.items()}
    return [_strict(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _valid_rows(path: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """Return (step, line, row) of each valid line; warn of broken ones, except for an incomplete last line."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append((int(row["step"]), line.decode(), row))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            broken += [number] if number < len(lines) else []
    if broken:
        named = ", ".join(map(str, broken[:5]))
        warnings.warn(
            f"{path}: {len(broken)} lines are no rows of metrics and are left out: line {named}", stacklevel=3
        )
    return rows


def _kind(row: Mapping[str, Any]) -> str:
    """Return the kind of a row: a step may have one each of "update", "eval" and ``SAVE``."""
    return SAVE if SAVE in row else "eval" if any(name.startswith("eval/") for name in row) else "update"


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, with ``step``.

    A row that cannot be written is written with a later one.

    Args:
        path: The file.
        rows: For a run that resumes, the number of rows, without those of ``SAVE``, when its checkpoint was written.
            Later rows, duplicates and broken rows are removed, and the others sorted by step, so that the file ends up
            equal to that of an uninterrupted run. None starts a new file and keeps an existing one as
            ``metrics.jsonl.old``.
        step: Step of the checkpoint; default: that of the last row that is kept.
        evaluated: Whether the file had the evaluation of ``step`` when the checkpoint was written.
    """

    def __init__(
        self, path: str | Path, rows: int | None = None, step: int | None = None, evaluated: bool = True
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.waiting = b""
        if rows is not None:
            self._rewind(rows, step, evaluated)
        else:
            keep_aside(self.path)
        self.rows = rows or 0

    def _rewind(self, rows: int, step: int | None, evaluated: bool) -> None:
        found = {(at, _kind(row)): line for at, line, row in _valid_rows(self.path)}  # of a repeated row the last
        counted = sorted((key for key in found if key[1] != SAVE), key=lambda key: key[0])
        if step is not None:
            counted = [key for key in counted if key[0] < step or (key[0] == step and (evaluated or key[1] != "eval"))]
        counted = counted[:rows]
        last = step if step is not None else counted[-1][0] if counted else -1
        wanted = {*counted, *(key for key in found if key[1] == SAVE and key[0] <= last)}
        text = "".join(f"{found[key]}\n" for key in sorted(found, key=lambda key: key[0]) if key in wanted)
        if self.path.exists() and text.encode() != self.path.read_bytes():
            write_text(self.path, text)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row of numbers, text, lists, dicts and tensors; NaN is written as null, infinity as "inf"."""
        assert "step" not in metrics, "the step is an argument of its own"
        line = json.dumps({"step": int(step), **_strict(metrics)}, allow_nan=False) + "\n"
        self.rows += SAVE not in metrics
        self.waiting += line.encode()
        try:
            # Opened for each row: nothing to close, and the file may be moved or rotated while the run goes on.
            with self.path.open("ab", buffering=0) as file:
                self._append(file)
        except OSError as error:
            warnings.warn(f"{self.path}: {error}; the row waits for the next one", stacklevel=2)

    def _append(self, file: RawIOBase) -> None:
        """Write all waiting rows or none: an incomplete line in the middle would make the file unreadable."""
        before = file.tell()
        try:
            if file.write(self.waiting) != len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise
        self.waiting = b""

    def sync(self) -> None:
        """Flush the file to the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Return the rows; broken lines are left out, with a warning unless it is an incomplete last line."""
        return [row for _, _, row in _valid_rows(Path(path))]


def tracker_names(report_to: str) -> list[str]:
    """Parse ``none``, ``all`` (that are installed) or a comma-separated list of ``TRACKERS`` for accelerate.

    Raises:
        ValueError: An unknown tracker, or one that is not installed (accelerate would ignore it silently).
    """
    names = [name.strip() for name in report_to.split(",")]
    if names == ["none"]:
        return []
    if names == ["all"]:
        if installed := [name for name in TRACKERS if find_spec(name) is not None]:
            return installed
        raise ValueError(f"report_to all: none of {', '.join(TRACKERS)} is installed: pip install tensorboard")
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"report_to {', '.join(unknown)!r} is unknown; use none, all, or any of {', '.join(TRACKERS)}")
    if absent := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"report_to {absent[0]!r} is not installed: pip install {absent[0]}, or report_to none")
    return list(dict.fromkeys(names))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to dotted names and plain scalars, which every tracker accepts as hyperparameters."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def pictures_of(paths: Iterable[Path]) -> Pictures:
    """Open the PNG files among some paths, by their name without suffix."""
    return {path.stem: [(Image.open(path), "")] for path in paths if path.suffix == ".png"}


def _show_in_tensorboard(tracker: Any, name: str, pictures: Sequence[Captioned], step: int) -> None:
    for number, (image, _) in enumerate(pictures):
        tag = name if len(pictures) == 1 else f"{name}/{number:02d}"
        tracker.writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    captions = "\n".join(f"{number}. {text}" for number, (_, text) in enumerate(pictures) if text)
    if captions:
        tracker.writer.add_text(f"{name}/captions", captions, step)


def _show_in_wandb(tracker: Any, name: str, pictures: Sequence[Captioned], step: int) -> None:
    import wandb

    tracker.log({name: [wandb.Image(image, caption=text or None) for image, text in pictures]}, step=step)


def _show_in_trackio(tracker: Any, name: str, pictures: Sequence[Captioned], step: int) -> None:
    import trackio

    named = {f"{name}/{n:02d}" if len(pictures) > 1 else name: pair for n, pair in enumerate(pictures)}
    tracker.log({key: trackio.Image(image, caption=text or None) for key, (image, text) in named.items()}, step=step)


SHOW: Mapping[str, Callable[[Any, str, Sequence[Captioned], int], None]] = {
    "tensorboard": _show_in_tensorboard,
    "wandb": _show_in_wandb,
    "trackio": _show_in_trackio,
}


class Trackers:
    """Log to accelerate's trackers; one that raises is switched off with a warning, and training continues.

    Args:
        accelerator: Built with ``log_with=tracker_names(report_to)``.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        """Start each tracker with the run's configuration, nested or flat."""
        chosen, running = list(self.accelerator.log_with), []
        for tracker in chosen:
            # One at a time: a failing one must not take the others along.
            self.accelerator.log_with, self.accelerator.trackers = [tracker], []
            if _survives(tracker, partial(self.accelerator.init_trackers, project, _flat(config))):
                running += self.accelerator.trackers
        self.accelerator.log_with, self.accelerator.trackers = chosen, running

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a step on the main process; other values are in ``metrics.jsonl`` only."""
        if not self.accelerator.is_main_process:
            return
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in list(self.accelerator.trackers):
            if not _survives(tracker, partial(tracker.log, numbers, step=step)):
                self.accelerator.trackers.remove(tracker)

    def pictures(self, pictures: Callable[[], Pictures], step: int) -> None:
        """Log images with their captions on the main process, if there is a tracker; those of a name together."""
        known = [tracker for tracker in self.accelerator.trackers if tracker.name in SHOW]
        if not (known and self.accelerator.is_main_process):
            return
        found = pictures()
        for tracker in known:
            show = SHOW[tracker.name]
            if not all(_survives(tracker, partial(show, tracker, name, own, step)) for name, own in found.items()):
                self.accelerator.trackers.remove(tracker)

    def finish(self) -> None:
        """Close all trackers."""
        while self.accelerator.trackers:
            tracker = self.accelerator.trackers.pop()
            _survives(tracker, tracker.finish)


def _survives(tracker: Any, call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception as error:
        name = str(getattr(tracker, "name", tracker)).lower()
        warnings.warn(f"tracker {name} failed and is switched off; metrics.jsonl goes on: {error!r}", stacklevel=3)
        return False
    return True
