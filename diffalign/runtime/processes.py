"""Makes sure that a run has the processes that its launcher was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import psutil
import torch

from diffalign.config import load_yaml

LAUNCHERS = ("accelerate", "accelerate-launch")
WHAT_WORKS = (
    "On CPUs, `accelerate launch --cpu --num_processes N` starts one process only; use "
    "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...` or `torchrun --nproc_per_node N ...`"
)


def connect() -> None:
    """Call it before ``Accelerator()``: several processes without an accelerator are to work together on the CPU.

    Without the variable that is set here, each of them would believe to be alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def check_world(num_processes: int) -> None:
    """RuntimeError where the launcher was asked for another number of processes than there are."""
    wanted = asked_for(os.environ, _parent())
    if wanted is not None and wanted != num_processes:
        raise RuntimeError(
            f"the launcher was asked for {wanted} process(es), and this one is part of {num_processes}. {WHAT_WORKS}"
        )


def asked_for(environment: Mapping[str, str], parent: Sequence[str]) -> int | None:
    """The number of processes that a launcher set in the environment or was told on its command line, else None.

    parent: the command line of the parent process.
    """
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    if not any(os.path.basename(token) in LAUNCHERS for token in parent[:2]):
        return None
    options = {}
    for token, following in zip(parent, [*parent[1:], ""], strict=True):
        if token.endswith(".py"):
            break  # what follows is for the script
        name, equals, value = token.partition("=")
        options[name.lstrip("-").replace("-", "_")] = value if equals else following
    if "num_processes" in options:
        return int(options["num_processes"])
    file = options.get("config_file")
    return int(load_yaml(file).get("num_processes", 1)) if file else None


def _parent() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []  # another user's process, or gone: nothing can be learned from it
