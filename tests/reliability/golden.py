"""Trajectories to compare with later: ``python -m tests.reliability.golden`` rewrites them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch

from diffalign.runtime.provenance import machine
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import ROOT
from tests.reliability.trainers import TRAINERS, short

FILE = ROOT / "tests/golden/trajectories.json"
STEPS = 50


def where() -> dict[str, str]:
    """What last bits depend on."""
    here = machine(1, "cpu")
    return {"torch": here["torch"], "processor": here["processor"]}


def trajectory(name: str, folder: Path, steps: int = STEPS) -> dict[str, list[float]]:
    """Loss and gradient norm of each step of a short run, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        args = short(name, folder, max_train_steps=steps, checkpointing_steps=0)
        TRAINERS[name].make(args).train()
    finally:
        torch.set_num_threads(threads)
    rows = [row for row in MetricsLog.read(folder / "metrics.jsonl") if "loss" in row]
    return {figure: [row[figure] for row in rows] for figure in ("loss", "grad_norm")}


def digests(folder: str) -> dict[str, str]:
    """What two steps of each trainer make of its weights."""
    found = {}
    for name in TRAINERS:
        torch.set_num_threads(1)
        trainer = TRAINERS[name].make(short(name, Path(folder) / name, max_train_steps=2))
        trainer.train()
        content = b"".join(p.detach().numpy().tobytes() for p in trainer.loop.state.parameters)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def main() -> None:
    """Writes ``FILE``."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: {"where": where(), **trajectory(name, Path(folder) / name)} for name in TRAINERS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
