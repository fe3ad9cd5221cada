"""Whether two runs are the same, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from diffalign.runtime import checkpoint
from diffalign.runtime.tracking import MetricsLog

SAVE = "time/save"
TIMES = ("time/collect", "time/update", "images_per_second")


def rows(folder: Path) -> list[dict]:
    """The metrics of a run, less what a clock says."""
    found = [row for row in MetricsLog.read(folder / "metrics.jsonl") if SAVE not in row]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def same_checkpoint(one: Path, two: Path) -> None:
    """Weights, EMA, moments, schedule, counters, guard and the task's own state."""
    (tensors, state), (others, other_state) = checkpoint.load(one), checkpoint.load(two)
    for kept in (state, other_state):
        kept.pop("origin")
    assert state == other_state
    assert tensors.keys() == others.keys()
    for group in tensors:
        assert tensors[group].keys() == others[group].keys(), group
        for name, tensor in tensors[group].items():
            torch.testing.assert_close(tensor, others[group][name], rtol=0, atol=0, equal_nan=True)


def same_run(one: Path, two: Path) -> None:
    """Two folders of finished runs."""
    newest = [checkpoint.latest(folder) for folder in (one, two)]
    assert newest[0].name == newest[1].name
    same_checkpoint(*newest)
    assert rows(one) == rows(two)
    assert files(one) == files(two)


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of the run's products: pictures and weights."""
    found = [
        *folder.glob("*.safetensors"),
        *folder.glob("raw/*"),
        *folder.glob("samples/*"),
        *folder.glob("compare.png"),
    ]
    # The header names the configuration, and with it the folder.
    return {str(path.relative_to(folder)): _content(path) for path in sorted(found)}


def _content(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = content[8 + int.from_bytes(content[:8], "little") :]
    return hashlib.sha256(content).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
