"""Choose settings for the memory of a card: ``memory: 24GB`` and ``diffalign fit``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffalign.config import free_fields
from diffalign.config.fields import given_names
from diffalign.device import default_device, total_memory
from diffalign.forecast.dry_run import Place, free_memory, place_of
from diffalign.forecast.fitter import SAVINGS, SPARE, Fit, Fitter
from diffalign.models.single_file import is_local
from diffalign.runtime.checkpoint import CheckpointError, recorded_config
from diffalign.runtime.output_copy import find_checkpoint
from diffalign.trainers.registry import Entry

SIZES = (12, 16, 24, 40, 48, 80)  # GB of the table of ``diffalign fit``
ASSUMED = "24GB"  # of ``memory: auto`` in a dry run without a card
UNITS = {"gb": 10**9, "gib": 2**30, "": 10**9}


def parse_memory(text: str) -> int:
    """Return the bytes of "24GB", "22.5 GiB" or "auto", what is free here. ValueError: another text, or no size."""
    if is_auto(text):
        return free_memory()[0]
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gb|gib|)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"memory {text[:40]!r} is no size: write memory: 24GB, or memory: auto for what is free")
    return int(float(found[1]) * UNITS[found[2].lower()])


def is_auto(text: str) -> bool:
    """Return whether a setting of ``memory`` asks for what is free."""
    return text.strip().lower() == "auto"


@dataclass(frozen=True)
class Budget:
    """Memory to fit a run into.

    Attributes:
        size: Bytes.
        text: What it is, for messages.
        place: Processes, sharding and card.
    """

    size: int
    text: str
    place: Place


def find_budget(memory: str, place: Place, local: bool, dry: bool) -> Budget:
    """Return the memory that a setting of ``memory`` means.

    Args:
        memory: The setting.
        place: Processes, sharding and card.
        local: Whether the model's weights are in a folder here.
        dry: Whether the run is only forecast.

    Raises:
        ValueError: It is no size, or not known alike in all processes.
    """
    if not is_auto(memory):
        size = parse_memory(memory)
        return Budget(size, memory, replace(place, memory=size))
    if place.card is not None:
        return Budget(place.card.memory * 10**9, f"auto, {place.card.title}", place)
    if place.cpu and dry and not local:
        size = parse_memory(ASSUMED)
        text = f"auto, without a GPU here: a card of {ASSUMED} is assumed (--memory 80GB, or --card h100, for another)"
        return Budget(size, text, replace(place, memory=size))
    if place.share.world == 1:
        size, where = free_memory()
        return Budget(size, f"auto, {size / 1e9:.1f} GB free of {where}", place)
    if place.cpu or place.share.world > int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
        raise ValueError("memory auto: processes may find different sizes free: write memory: 24GB, of one card")
    size = total_memory(default_device().type)
    return Budget(size, f"auto, {size / 1e9:.1f} GB of the smallest card here", place)


def fit_memory(entry: Entry, config: Any) -> tuple[Any, str]:
    """Choose the settings for ``config.memory``, in the processes of the launcher.

    A run that resumes keeps what changes its results, as it was chosen when it began; its batches may change.

    Returns:
        The configuration with them, and a line that says what was chosen.

    Raises:
        ValueError: Nothing fits.
    """
    return choose(entry, config, place_of())[:2]


def choose(entry: Entry, config: Any, place: Place, *, dry: bool = False) -> tuple[Any, str, Place]:
    """Choose the settings for ``config.memory``, as ``fit_memory`` does.

    Args:
        entry: The algorithm.
        config: Its configuration.
        place: Processes and card.
        dry: Whether the run is only forecast.

    Returns:
        The configuration with the settings, a line that says what was chosen, and the place with its memory.
    """
    budget = find_budget(config.memory, place, is_local(config.model), dry)
    config, kept = resumed(config)
    found = Fitter(entry, config, budget.place, budget.place.cpu, frozenset(kept)).fit(budget.size)
    if found is None:
        runs = f"; this run began with {_listed(kept)}, which it keeps" if kept else ""
        raise ValueError(
            f"memory {budget.text}: no settings fit; lower resolution or lora.rank, take a smaller model, or leave "
            f"out fields that are set (batch sizes, offload, base_precision, quantise){runs}"
        )
    return found.config, f"memory {budget.text}: {described(found, kept)}", budget.place


def resumed(config: Any) -> tuple[Any, dict[str, Any]]:
    """Take over what a run to resume has chosen and may not change.

    Returns:
        The configuration, and the fields that were taken over, by name.
    """
    fixed = {name for saving in SAVINGS for name in saving} - free_fields(type(config)) - set(given_names(config))
    try:
        path = find_checkpoint(config)
    except CheckpointError:
        return config, {}  # the run itself says what is wrong
    if path is None:
        return config, {}
    then = recorded_config(path)
    kept = {name: then[name] for name in sorted(fixed) if name in then and hasattr(config, name)}
    return replace(config, **kept), kept


def described(found: Fit, kept: Mapping[str, Any] | None = None) -> str:
    """Describe what was chosen on a line."""
    of_run = f" (as the run began: {_listed(kept)})" if kept else ""
    return f"{_listed(found.chosen) or 'nothing to choose'}{of_run}; rehearsed peak {found.peak / 1e9:.1f} GB"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_shown(value)}" for name, value in settings.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(entry: Entry, config: Any, sizes: Sequence[int] = SIZES) -> list[str]:
    """Format a line per size of memory with the settings for it."""
    fitter, lines = Fitter(entry, config, place_of()), []
    for size in sizes:
        found = fitter.fit(size * 10**9)
        lines.append(f"{size:3} GB  {'does not fit' if found is None else described(found)}")
    return lines


def show_table(entry: Entry, config: Any) -> None:
    """Print the table of ``diffalign fit``."""
    print(f"{entry.name} of {config.model}: settings that leave {SPARE:.0%} of the memory, by rehearsal", flush=True)
    for line in table(entry, config):
        print(line, flush=True)
