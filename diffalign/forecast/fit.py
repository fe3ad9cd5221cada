"""Choose settings that fit a run into memory, by rehearsal: ``memory: 24GB`` and ``diffalign fit``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffalign.config.fields import given_names
from diffalign.forecast.dry_run import Place, free_memory, place_of
from diffalign.forecast.rehearsal import NOT_FAKE, rehearse
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import Entry

SPARE = 0.08  # share of the memory for kernels, fragmentation and the CUDA context
SIZES = (12, 16, 24, 40, 48, 80)  # GB of the table of ``diffalign fit``
ENOUGH = 4  # images of a pass, below which the next saving is tried first
UNITS = {"gb": 10**9, "gib": 2**30, "": 10**9}
BATCHES = ("rollout_batch_size", "train_batch_size")
# Savings in the order of what they cost; each adds to those before it.
SAVINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"offload": ("text_encoders",)},
    {"offload": ("text_encoders", "vae")},
    {"base_precision": "bf16"},
    {"quantise": "4bit"},
    {"decode_slice": 1, "vae_checkpointing": True},
)


def parse_memory(text: str) -> int:
    """Return the bytes of "24GB", "22.5 GiB" or "auto", what is free here. ValueError: another text, or no size."""
    if text.strip().lower() == "auto":
        return free_memory()[0]
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gb|gib|)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"memory {text[:40]!r} is no size: write memory: 24GB, or memory: auto for what is free")
    return int(float(found[1]) * UNITS[found[2].lower()])


@dataclass(frozen=True)
class Fit:
    """Settings that fit.

    Attributes:
        config: The configuration with them, without ``memory``.
        chosen: What was chosen, by field.
        peak: Bytes at the peak.
    """

    config: Any
    chosen: Mapping[str, Any]
    peak: int


@dataclass
class Fitter:
    """Find settings for several sizes of memory; every rehearsal is kept.

    Attributes:
        entry: The algorithm.
        config: The configuration, whose given fields stay as they are.
        place: Processes and sharding.
        cpu: Whether the memory is that of a machine without an accelerator.
    """

    entry: Entry
    config: Any
    place: Place = field(default_factory=lambda: Place(Share()))
    cpu: bool = False
    _peaks: dict[str, float] = field(default_factory=dict)
    _refusal: ValueError | None = None

    def fit(self, budget: int) -> Fit | None:
        """Return the cheapest settings whose peak leaves ``SPARE`` of ``budget`` bytes; None if nothing fits.

        Raises:
            ValueError: The run is refused with any settings, or its code does not run on fake tensors.
        """
        room = int(budget * (1 - SPARE))
        ladder = self._ladder()
        for least in (ENOUGH, 1):
            for settings in ladder:
                if (found := self._largest(settings, room, least)) is not None:
                    return found
        if self._refusal is not None and not any(map(math.isfinite, self._peaks.values())):
            raise self._refusal
        return None

    def _ladder(self) -> list[dict[str, Any]]:
        """Accumulate the savings that are not given, apply to this configuration, and are valid."""
        given = set(given_names(self.config))
        ladder: list[dict[str, Any]] = []
        settings: dict[str, Any] = {}
        for saving in SAVINGS:
            new = {name: value for name, value in saving.items() if hasattr(self.config, name) and name not in given}
            if self.config.lora.rank == 0:
                new = {name: value for name, value in new.items() if name not in ("base_precision", "quantise")}
            if self.cpu:  # main memory is where offloading moves to, and bitsandbytes needs a GPU
                new = {name: value for name, value in new.items() if name not in ("offload", "quantise")}
            if self.place.spread is not None:
                new.pop("quantise", None)
            if ladder and not new:
                continue
            settings = settings | new
            ladder.append(settings)
        return ladder

    def _largest(self, settings: Mapping[str, Any], room: int, least: int) -> Fit | None:
        """Return the largest batches, by halving, that fit with these savings, from ``least`` images up."""
        given = set(given_names(self.config))
        free = [name for name in BATCHES if hasattr(self.config, name) and name not in given]
        most = {name: getattr(self.config, name) for name in free}
        batches = {name: min(least, size) for name, size in most.items()}
        # Some methods need whole groups in a batch, and refuse smaller ones.
        while math.isinf(self._peak({**settings, **batches})) and batches != most:
            batches = {name: min(2 * size, most[name]) for name, size in batches.items()}
        if self._peak({**settings, **batches}) > room:
            return None
        for name in free:
            while (larger := min(2 * batches[name], most[name])) > batches[name]:
                if self._peak({**settings, **batches, name: larger}) > room:
                    break
                batches[name] = larger
        chosen = {**settings, **batches}
        return Fit(replace(self.config, memory=None, **chosen), chosen, int(self._peak(chosen)))

    def _peak(self, settings: Mapping[str, Any]) -> float:
        """Return the peak with some settings, in bytes; infinity if the run is refused with them."""
        key = repr(sorted(settings.items()))
        if key not in self._peaks:
            try:
                self._peaks[key] = self._rehearsed_peak(replace(self.config, memory=None, **settings))
            except ValueError as error:
                self._peaks[key], self._refusal = math.inf, error
        return self._peaks[key]

    def _rehearsed_peak(self, config: Any) -> int:
        share = self.place.share
        short = brief(config, share.world)
        try:
            found = rehearse(self.entry, short, share.world, self.place.spread, cpu=self.cpu)
        except NOT_FAKE as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
            raise ValueError(
                f"memory is not forecast, because code of this run does not run on fake tensors ({why}): set batch "
                "sizes, offload and base_precision yourself, and leave out memory"
            ) from error
        stored = 0
        if (cost := self.entry.cost) is not None:
            whole, part = (cost.stored(one, (1, 1, 1), share) for one in (config, short))
            stored = whole - part
        return found.peak + stored * found.latent_numbers


def brief(config: Any, world: int = 1) -> Any:
    """Shorten an iteration to at least two passes per process, which have its peak apart from stored latents."""
    if getattr(config, "train_data", ()) or not hasattr(config, "num_groups"):
        return replace(config, num_pairs=min(config.num_pairs, 2 * config.train_batch_size * world))
    parts = world * getattr(config, "updates_per_rollout", 1)
    least = 2 * max(config.rollout_batch_size, config.train_batch_size) * parts
    unit = parts * (config.plan.leaves if hasattr(config, "plan") else 1)
    every = 1 if config.num_groups % world else world  # some methods need whole groups in a process
    for groups in range(every, config.num_groups, every):
        if (images := groups * config.group_size) >= least and images % unit == 0:
            return replace(config, num_groups=groups)
    return config


def fit_memory(entry: Entry, config: Any) -> tuple[Any, str]:
    """Choose the settings for ``config.memory``.

    Returns:
        The configuration with them, and a line that says what was chosen.

    Raises:
        ValueError: Nothing fits.
    """
    budget, place = parse_memory(config.memory), place_of()
    here = config.memory.strip().lower() == "auto"
    if here and place.share.world > 1:
        raise ValueError("memory auto: processes may find different sizes free: write memory: 24GB, of one card")
    found = Fitter(entry, config, place, cpu=here and place.cpu).fit(budget)
    if found is None:
        raise ValueError(
            f"memory {config.memory}: no settings fit; lower resolution or lora.rank, take a smaller model, or leave "
            "out fields that are set (batch sizes, offload, base_precision, quantise)"
        )
    return found.config, f"memory {config.memory}: {described(found)}"


def described(found: Fit) -> str:
    """Describe what was chosen on a line."""
    chosen = ", ".join(f"{name}: {_shown(value)}" for name, value in found.chosen.items())
    return f"{chosen or 'nothing to choose'}; rehearsed peak {found.peak / 1e9:.1f} GB"


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
