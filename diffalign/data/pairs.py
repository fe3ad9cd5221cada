"""Preference pairs that fit on disk: any of them by its number, images only when they are asked for."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

from diffalign.data.ai_labels import Labels
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import FORMATS, Format, detect
from diffalign.data.images import decode_sample
from diffalign.data.row import Row
from diffalign.data.tables import Table, open_table
from diffalign.data.validation import DataWarning, Quarantine, SampleError
from diffalign.files import bounded, shorten
from diffalign.structures import LabelledImage, Pair

T = TypeVar("T", Pair, LabelledImage)


def usable_images(
    sample: Pair | LabelledImage, settings: PreferenceDataConfig, quarantine: Quarantine, count_kept: bool = False
) -> tuple[Image.Image, ...] | None:
    """The images of a sample in RGB; None, noted in the quarantine, where it has to be left out.

    count_kept: count what is odd but kept too, which is right the first time that a sample comes by.
    """
    if sample.key in quarantine.dropped:
        return None
    try:
        images, odd = decode_sample(sample, settings.min_side)
    except SampleError as error:
        quarantine.keeps(error)
        return None
    kept = [quarantine.keeps(f) for f in odd if count_kept or quarantine.actions[f.kind] != "keep"]
    return images if all(kept) else None


class Samples(ABC, Generic[T]):
    """Samples by their number, of which a few may turn out to be bad when their images are read.

    A bad one keeps its number, so that the others keep theirs: ``load`` gives the next good one in its place.
    """

    def __init__(self, settings: PreferenceDataConfig, quarantine: Quarantine) -> None:
        self.settings, self.quarantine = settings, quarantine

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> T: ...

    def load(self, index: int) -> tuple[T, tuple[Image.Image, ...]]:
        """The sample at ``index`` with its images, or the next good one.

        A ``DataWarning`` names a bad one the first time. ValueError: too many of them, or none is good.
        """
        for step in range(len(self)):
            place = (index + step) % len(self)
            sample, known = self[place], len(self.quarantine.dropped)
            if (images := usable_images(sample, self.settings, self.quarantine)) is not None:
                self.confirm(place, sample)
                return sample, images
            if len(self.quarantine.dropped) > known:
                warnings.warn(f"left out: {sample.key}: {self.quarantine.why(sample.key)}", DataWarning, stacklevel=2)
                self.quarantine.enforce(len(self))
        raise ValueError("not one sample can be used: diffalign check says why")

    def confirm(self, index: int, sample: T) -> None:
        """ValueError where a sample is not what its label was given for."""

    def examine(self, limit: int | None) -> None:
        """Reads the images of ``limit`` samples, evenly spread; None: of all. ValueError: too many are bad."""
        count = len(self) if limit is None else min(limit, len(self))
        for place in (number * len(self) // count for number in range(count)):
            sample = self[place]
            if usable_images(sample, self.settings, self.quarantine, count_kept=True) is not None:
                self.confirm(place, sample)
        self.quarantine.examined += count
        self.quarantine.enforce()


S = TypeVar("S", bound=Samples)


def judgements(row: Row, format: Format) -> list[tuple[Pair, float | None]]:
    """The pairs of a row, and their labels: None where nobody judged, which the pair itself has as 0.5. SampleError."""
    prompt, found = row.prompt(), list(format.read(row))
    names = [row.name] if len(found) == 1 else [f"{row.name}, pair {place}" for place in range(len(found))]
    return [
        (Pair(name, prompt, (first, second), 0.5 if label is None else label, row.mask()), label)
        for name, (first, second, label) in zip(names, found, strict=True)
    ]


def noted(row: Row, format: Format, quarantine: Quarantine) -> list[tuple[Pair, float | None]]:
    """The same, where a bad row is noted and gives nothing."""
    quarantine.rows += 1
    try:
        found = judgements(row, format)
    except SampleError as error:
        quarantine.keeps(error)
        return []
    if found and not found[0][0].prompt.text and not quarantine.keeps(row.error("empty_caption", "prompt", "empty")):
        return []
    return found


def counted(pair: Pair, label: float | None, settings: PreferenceDataConfig, quarantine: Quarantine) -> Pair | None:
    """Return the pair with this label, or None where it is not used. ValueError: a tie, where ties are errors."""
    if label is None:
        quarantine.skipped["unlabelled"] += 1
    elif label == 0.5 and settings.ties != "soft":
        if settings.ties == "error":
            raise ValueError(f"{pair.key}: a tie; set ties to drop or soft, or take it out")
        quarantine.skipped["ties"] += 1
    else:
        return replace(pair, label=label)
    return None


@dataclass(frozen=True)
class Part:
    """A source of pairs: its table, its format, and AI labels where they replace its own."""

    table: Table
    format: Format
    labels: Labels | None = None

    def pair(self, row: int, place: int) -> Pair:
        """A pair by its row, and its place among the pairs of that row."""
        pair = judgements(self.table.row(row), self.format)[place][0]
        label = pair.label if self.labels is None else self.labels.of(f"{row}.{place}")
        return replace(pair, label=0.5 if label is None else label)

    def pairs(self, quarantine: Quarantine) -> Iterator[tuple[int, int, Pair, float | None]]:
        """Every pair as (row, place, pair, label), also those that nobody judged; bad rows are noted."""
        for number, row in enumerate(self.table.rows()):
            for place, (pair, label) in enumerate(noted(row, self.format, quarantine)):
                yield number, place, pair, label if self.labels is None else self.labels.of(f"{number}.{place}")


class PairData(Samples[Pair]):
    """The usable pairs of several sources, in the order of their rows.

    ``data[i]`` is a pair whose images nobody has read yet; ``data.load(i)`` reads them. ``data.validation`` says what
    was left out.
    """

    def __init__(self, parts: list[Part], settings: PreferenceDataConfig, quarantine: Quarantine) -> None:
        super().__init__(settings, quarantine)
        self.parts = parts
        # Three numbers a pair: a million pairs are 24 MB.
        self._locations = array("q")
        for number, part in enumerate(parts):
            quarantine.notes += part.table.notes
            for row, place, pair, label in part.pairs(quarantine):
                if counted(pair, label, settings, quarantine) is not None:
                    self._locations.extend((number, row, place))

    def __len__(self) -> int:
        return len(self._locations) // 3

    def __getitem__(self, index: int) -> Pair:
        part, row, place = self._place(index)
        return self.parts[part].pair(row, place)

    def _place(self, index: int) -> tuple[int, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        return tuple(self._locations[3 * index : 3 * index + 3])

    def confirm(self, index: int, sample: Pair) -> None:
        """ValueError where an AI label was given for another text or image."""
        part, row, place = self._place(index)
        labels = self.parts[part].labels
        if labels is not None:
            labels.check(f"{row}.{place}", sample)


def open_part(source: str | Path, settings: PreferenceDataConfig, formats: Mapping[str, Format] = FORMATS) -> Part:
    """Open a source in one of ``formats``. Raises ValueError for an ambiguous format or a missing column."""
    table = open_table(source, settings)
    format = detect(table.columns, settings.format, formats, table.name)
    return Part(table, format, Labels.load(source, settings.labels) if settings.labels else None)


def open_pairs(*sources: str | Path, settings: PreferenceDataConfig) -> PairData:
    """The pairs of ``sources``, whose images nobody has looked at. ValueError: no source is named."""
    if not sources:
        raise ValueError("name at least one source of preference pairs: a file, a folder or a hub id")
    quarantine = Quarantine(settings.on_fault, settings.max_bad_share)
    return PairData([open_part(source, settings) for source in sources], settings, quarantine)


def load_pairs(*sources: str | Path, settings: PreferenceDataConfig | None = None) -> PairData:
    """The pairs of ``sources``: files, folders or hub ids, see ``tables``; formats as in ``formats.FORMATS``.

    Rows are read without their images; then the images of ``settings.scan`` pairs are decoded. What is left out is said
    in one ``DataWarning``. FileNotFoundError: nothing there, or no such AI labels. ValueError: nothing that can be
    used, or more than ``max_bad_share`` that cannot.
    """
    return examined(open_pairs(*sources, settings=settings or PreferenceDataConfig()), ", ".join(map(str, sources)))


def examined(data: S, where: str) -> S:
    """The samples, after a first look at them: see ``load_pairs``."""
    data.quarantine.enforce()
    if not len(data):
        lines = [f"{kind}: {count}" for kind, count in data.quarantine.skipped.items()] + data.quarantine.lines()
        raise ValueError(bounded("\n".join([f"{shorten(where)}: not one sample is left", *lines])))
    data.examine(data.settings.scan)
    if lines := data.quarantine.lines():
        warnings.warn(bounded("\n".join([f"{shorten(where)}:", *lines])), DataWarning, stacklevel=3)
    return data
