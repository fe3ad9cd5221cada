"""Find settings with which a run fits into memory, by rehearsing it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from diffalign.config import free_fields
from diffalign.config.fields import given_names
from diffalign.diffusion.plan import make_plan
from diffalign.forecast.dry_run import Place
from diffalign.forecast.rehearsal import (
    EVALUATING,
    NOT_FAKE,
    SAMPLING,
    SCORING,
    STEPPING,
    TRAINING,
    Rehearsed,
    rehearse,
)
from diffalign.runtime.oom import batch_name
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import Entry

SPARE = 0.08  # share of the memory for kernels, fragmentation and the CUDA context
ENOUGH = 4  # images of a pass, below which the next saving is tried first
# Savings in the order of what they cost; each adds to those before it.
SAVINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"decode_slice": 1, "vae_checkpointing": True},
    {"offload": ("text_encoders",)},
    {"offload": ("text_encoders", "vae", "rewards")},
    {"base_precision": "bf16"},
    {"quantise": "4bit"},
)
ROLLOUT, TRAIN, TIMES = "rollout_batch_size", "train_batch_size", "train_times_per_forward"


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
        kept: Fields that stay as they are although they were not given.
    """

    entry: Entry
    config: Any
    place: Place = field(default_factory=lambda: Place(Share()))
    cpu: bool = False
    kept: frozenset[str] = frozenset()
    _rehearsed: dict[str, Rehearsed | None] = field(default_factory=dict)
    _refusal: ValueError | None = None

    def fit(self, budget: int) -> Fit | None:
        """Return the cheapest settings whose peak leaves ``SPARE`` of ``budget`` bytes; None if nothing fits.

        Savings that change no result come before those that round the weights of the base.

        Raises:
            ValueError: The run is refused with any settings, or its code does not run on fake tensors.
        """
        room = int(budget * (1 - SPARE))
        exact = free_fields(type(self.config))
        ladder = self._ladder
        count = next((i for i, settings in enumerate(ladder) if set(settings) - exact), len(ladder))
        for rungs in (ladder[:count], ladder[count:]):
            for least in (ENOUGH, 1):
                if (settings := self._first(rungs, least, room)) is not None:
                    return self._largest(settings, least, room)
        if self._refusal is not None and not any(self._rehearsed.values()):
            raise self._refusal
        return None

    # Savings --------------------------------------------------------------------------------------------------------

    @cached_property
    def _given(self) -> frozenset[str]:
        return frozenset(given_names(self.config)) | self.kept

    @cached_property
    def _ladder(self) -> list[dict[str, Any]]:
        """Accumulate the savings that are not given, apply to this configuration, and are valid."""
        ladder: list[dict[str, Any]] = []
        settings: dict[str, Any] = {}
        for saving in SAVINGS:
            new = {name: v for name, v in saving.items() if hasattr(self.config, name) and name not in self._given}
            if "offload" in new:
                kept = {
                    "rewards": not getattr(self.config, "rewards", {}),
                    "text_encoders": self.config.lora.text_encoder,
                }
                new["offload"] = tuple(part for part in new["offload"] if not kept.get(part, False))
                new = {name: value for name, value in new.items() if value != ()}
            if self.config.lora.rank == 0:
                new = {name: value for name, value in new.items() if name not in ("base_precision", "quantise")}
            if self.cpu:  # main memory is where offloading moves to, and bitsandbytes needs a GPU
                new = {name: value for name, value in new.items() if name not in ("offload", "quantise")}
            if self.place.spread is not None:
                new.pop("quantise", None)
            if (ladder and not new) or self._refused({**settings, **new}):
                continue
            settings = settings | new
            ladder.append(settings)
        return ladder

    def _refused(self, settings: Mapping[str, Any]) -> bool:
        """Return whether settings of a saving are refused with the largest batches, where those without are not."""
        config = replace(self.config, memory=None, **{name: sizes[-1] for name, sizes in self._sizes.items()})
        try:
            self._validate(config)
        except ValueError:
            return False  # for another reason, which the rehearsal will raise
        try:
            self._validate(replace(config, **settings))
        except ValueError:
            return True
        return False

    def _validate(self, config: Any) -> None:
        config.validate()
        if hasattr(config, "validate_batches"):
            config.validate_batches(self.place.share.world)

    def _first(self, rungs: Sequence[Mapping[str, Any]], least: int, room: int) -> Mapping[str, Any] | None:
        """Return the cheapest savings with which batches of at least ``least`` images fit; each saves something."""

        def fits(settings: Mapping[str, Any]) -> bool:
            return self._peak({**settings, **self._start(settings, least)}) <= room

        if not rungs or not fits(rungs[-1]):
            return None
        return rungs[bisect_left(range(len(rungs) - 1), True, key=lambda index: fits(rungs[index]))]

    # Batches --------------------------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> dict[str, list[int]]:
        """List the sizes of each batch that is not given, in order; batches that must agree have one list."""
        config = self.config
        names = dict.fromkeys((ROLLOUT, TRAIN, batch_name(config, "evaluate")))
        free = [name for name in names if hasattr(config, name) and name not in self._given]
        most = {name: min(getattr(config, name), self._count(name)) for name in free}
        if self._tied:
            both = (ROLLOUT, TRAIN)
            agreed = [getattr(config, name) for name in both if name not in free]
            count = self._count(TRAIN)
            top = min((most[name] for name in both if name in most), default=1)
            equal = agreed or [size for size in range(1, top + 1) if count % size == 0]
            return {name: equal if name in both else _powers(most[name], 1) for name in free}
        return {name: _powers(most[name], getattr(config, "group_size", 1)) for name in free}

    @property
    def _tied(self) -> bool:
        """Whether sampling and training must have equal batches, so that replayed densities are those of rollouts."""
        return getattr(self.config, "old_log_prob", "") == "rollout"

    def _count(self, name: str) -> int:
        """Return how many images a batch can have; pairs, for a data set of pairs."""
        config, world = self.config, self.place.share.world
        if getattr(config, "train_data", ()) or not hasattr(config, "num_groups"):
            return max(1, config.num_pairs // world) if name == TRAIN else getattr(config, name)
        images = config.num_groups * config.group_size // world
        return max(1, images // getattr(config, "updates_per_rollout", 1) if name == TRAIN else images)

    def _start(self, settings: Mapping[str, Any], least: int) -> dict[str, int]:
        """Return batches of at least ``least`` images, the smallest that the run accepts with some savings."""
        place = {name: bisect_left(sizes, min(least, sizes[-1])) for name, sizes in self._sizes.items()}
        while True:
            batches = {name: self._sizes[name][index] for name, index in place.items()}
            last = all(index == len(self._sizes[name]) - 1 for name, index in place.items())
            if last or self._found({**settings, **batches}) is not None:
                return batches
            place = {name: min(index + 1, len(self._sizes[name]) - 1) for name, index in place.items()}

    def _largest(self, settings: Mapping[str, Any], least: int, room: int) -> Fit:
        """Return the largest batches that fit with some savings, which fit with ``least`` images.

        The peak of each phase is a line in its batch: two rehearsals predict it, a third confirms.
        """
        start = self._start(settings, least)
        more = {name: self._next(name, size) for name, size in start.items()}
        one, two = (self._found({**settings, **batches}) for batches in (start, more))
        best = start
        if one is not None and two is not None:
            sizes = {name: self._predicted(name, one, two, start[name], more[name], room) for name in start}
            pair = min((size for name, size in sizes.items() if name in (ROLLOUT, TRAIN)), default=0)
            best = {name: pair if self._tied and name in (ROLLOUT, TRAIN) else size for name, size in sizes.items()}
        while best != start and self._peak({**settings, **best}) > room:
            best = {name: max(start[name], self._next(name, size, -1)) for name, size in best.items()}
        chosen = {**settings, **best}
        if self.place.spread is not None:  # weights are gathered once per pass, however much it computes
            chosen |= self._times(chosen, room)
        return Fit(replace(self.config, memory=None, **chosen), chosen, int(self._peak(chosen)))

    def _times(self, settings: Mapping[str, Any], room: int) -> dict[str, int]:
        """Return how many trained times of an image a pass takes: the most that fit; nothing without such a setting.

        Where sampling and training must have equal batches, those of sampling grow with it.
        """
        config = replace(self.config, memory=None, **settings)
        if not hasattr(config, TIMES) or TIMES in self._given:
            return {}
        for times in sorted((times for times in range(2, _trained_times(config) + 1)), reverse=True):
            more = {TIMES: times}
            if self._tied:
                more[ROLLOUT] = config.train_batch_size * times
                if ROLLOUT in self._given or more[ROLLOUT] > self._count(ROLLOUT):
                    continue
            if _trained_times(config) % times == 0 and self._peak({**settings, **more}) <= room:
                return more
        return {}

    def _next(self, name: str, size: int, step: int = 1) -> int:
        sizes = self._sizes[name]
        return sizes[min(max(sizes.index(size) + step, 0), len(sizes) - 1)]

    def _predicted(self, name: str, one: Rehearsed, two: Rehearsed, small: int, large: int, room: int) -> int:
        """Return the largest size of a batch whose phases are predicted to fit, from rehearsals of two sizes."""
        best = small
        for size in self._sizes[name]:
            steps = (size - small) / max(1, large - small)
            peaks = [one.peak_of(p) + steps * (two.peak_of(p) - one.peak_of(p)) for p in self._phases(name)]
            if size >= small and max(peaks) <= room:
                best = size
        return best

    def _phases(self, name: str) -> tuple[str, ...]:
        """Return the phases whose peaks depend on a batch."""
        found: tuple[str, ...] = (TRAINING, STEPPING) if name == TRAIN else ()
        found += (SAMPLING, SCORING) if name == ROLLOUT else ()
        return found + ((EVALUATING,) if name == batch_name(self.config, "evaluate") else ())

    # Rehearsals -----------------------------------------------------------------------------------------------------

    def _peak(self, settings: Mapping[str, Any]) -> float:
        """Return the peak with some settings, in bytes; infinity if the run is refused with them."""
        found = self._found(settings)
        return math.inf if found is None else found.peak

    def _found(self, settings: Mapping[str, Any]) -> Rehearsed | None:
        """Rehearse the run with some settings; None if it is refused with them."""
        key = repr(sorted(settings.items()))
        if key not in self._rehearsed:
            config = replace(self.config, memory=None, **settings)
            try:
                self._validate(config)
                self._rehearsed[key] = self._whole(config)
            except ValueError as error:
                self._rehearsed[key], self._refusal = None, error
        return self._rehearsed[key]

    def _whole(self, config: Any) -> Rehearsed:
        """Rehearse a short iteration, and add what a whole one stores."""
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
        if (cost := self.entry.cost) is None:
            return found
        whole, part = (cost.stored(one, (1, 1, 1), share) for one in (config, short))
        stored = (whole - part) * found.latent_numbers
        return replace(found, peaks={where: size + stored for where, size in found.peaks.items()})


def _trained_times(config: Any) -> int:
    """Return the trained times of an image."""
    if hasattr(config, "times_per_image"):
        return int(config.times_per_image)
    return len(make_plan(config.plan, 0, config.seed, trees=True).trained_steps)


def _powers(most: int, group: int) -> list[int]:
    """List powers of two, and whole groups times these, up to ``most``, itself included."""
    doublings = [1 << power for power in range(most.bit_length())]
    return sorted({size for one in doublings for size in (one, one * group) if size <= most} | {most})


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
