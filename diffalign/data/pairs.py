"""Map-style access to preference pairs that fit on disk; images are read when a pair is loaded."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from PIL import Image

from diffalign.data.ai_labels import Labels
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import FORMATS, Format, detect
from diffalign.data.images import decode_sample
from diffalign.data.row import Row
from diffalign.data.tables import IN_MEMORY, Table, open_table
from diffalign.data.validation import DataWarning, Quarantine, SampleError
from diffalign.files import bounded, shorten
from diffalign.structures import LabelledImage, Pair

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T", Pair, LabelledImage)


def usable_images(
    sample: Pair | LabelledImage, settings: PreferenceDataConfig, quarantine: Quarantine, count_kept: bool = False
) -> tuple[Image.Image, ...] | None:
    """Decode the images of a sample to RGB; return None and record the error if the sample is dropped.

    count_kept: also count errors whose action is "keep"; set it on the first visit of a sample only.
    """
    if sample.key in quarantine.dropped:
        return None
    try:
        images, errors = decode_sample(sample, settings.min_side)
    except SampleError as error:
        quarantine.keeps(error)
        return None
    kept = [quarantine.keeps(e) for e in errors if count_kept or quarantine.actions[e.kind] != "keep"]
    return images if all(kept) else None


class Samples(ABC, Generic[T]):
    """Samples by index; a few may turn out to be unusable when their images are read.

    An unusable sample keeps its index, so that the indices of the others do not move: ``load`` returns the next usable
    sample instead.
    """

    def __init__(self, settings: PreferenceDataConfig, quarantine: Quarantine) -> None:
        self.settings, self.quarantine = settings, quarantine

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> T: ...

    def load(self, index: int) -> tuple[T, tuple[Image.Image, ...]]:
        """Load the sample at ``index`` with its images, or the next usable one, as ``load_first``."""
        _, sample, images = self.load_first((index + step) % len(self) for step in range(len(self)))
        return sample, images

    def load_first(self, positions: Iterable[int]) -> tuple[int, T, tuple[Image.Image, ...]]:
        """Load the first usable sample at ``positions``: its position, the sample, and its images.

        A ``DataWarning`` names an unusable sample the first time. ValueError: too many of them, or none is usable.
        """
        for position in positions:
            sample, known = self[position], len(self.quarantine.dropped)
            if (images := usable_images(sample, self.settings, self.quarantine)) is not None:
                self.confirm(position, sample)
                return position, sample, images

            if len(self.quarantine.dropped) > known:
                warnings.warn(f"left out: {sample.key}: {self.quarantine.why(sample.key)}", DataWarning, stacklevel=2)
                self.quarantine.enforce(len(self))
        raise ValueError("no sample can be used: run diffalign check to see why")

    def confirm(self, index: int, sample: T) -> None:
        """Raise ValueError if the sample changed after its label was made."""

    def examine(self, limit: int | None) -> None:
        """Decode the images of ``limit`` evenly spaced samples, or of all. ValueError: too many are unusable."""
        count = len(self) if limit is None else min(limit, len(self))
        for index in (number * len(self) // count for number in range(count)):
            sample = self[index]
            if usable_images(sample, self.settings, self.quarantine, count_kept=True) is not None:
                self.confirm(index, sample)
        self.quarantine.examined += count
        self.quarantine.enforce()


S = TypeVar("S", bound=Samples)


def judgements(row: Row, format: Format) -> list[tuple[Pair, float | None]]:
    """Read the pairs of a row with their labels: None if unlabelled, where the pair has 0.5. Raises SampleError."""
    prompt, found = row.prompt(), list(format.read(row))
    names = [row.name] if len(found) == 1 else [f"{row.name}, pair {index}" for index in range(len(found))]
    return [
        (Pair(name, prompt, (first, second), 0.5 if label is None else label, row.mask()), label)
        for name, (first, second, label) in zip(names, found, strict=True)
    ]


def noted(row: Row, format: Format, quarantine: Quarantine) -> list[tuple[Pair, float | None]]:
    """Read the pairs of a row as ``judgements`` does; an invalid row is recorded and has none."""
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
            raise ValueError(f"{pair.key}: a tie; set ties to drop or soft, or remove the pair")
        quarantine.skipped["ties"] += 1
    else:
        return replace(pair, label=label)
    return None


@dataclass(frozen=True)
class Part:
    """A source of pairs: its table, its format, and AI labels that replace its own, if any."""

    table: Table
    format: Format
    labels: Labels | None = None

    def pair(self, row: int, place: int) -> Pair:
        """A pair by its row, and its place among the pairs of that row."""
        pair = judgements(self.table.row(row), self.format)[place][0]
        label = pair.label if self.labels is None else self.labels.of(f"{row}.{place}")
        return replace(pair, label=0.5 if label is None else label)

    def pairs(self, quarantine: Quarantine) -> Iterator[tuple[int, int, Pair, float | None]]:
        """Yield every pair as (row, index in the row, pair, label), unlabelled ones too; record invalid rows."""
        for number, row in enumerate(self.table.rows()):
            for index, (pair, label) in enumerate(noted(row, self.format, quarantine)):
                yield number, index, pair, label if self.labels is None else self.labels.of(f"{number}.{index}")


class PairData(Samples[Pair]):
    """The usable pairs of several sources, in the order of their rows.

    ``data[i]`` is a pair whose images are not read yet; ``data.load(i)`` reads them. ``data.quarantine`` lists the
    dropped samples.
    """

    def __init__(self, parts: list[Part], settings: PreferenceDataConfig, quarantine: Quarantine) -> None:
        super().__init__(settings, quarantine)
        self.parts = parts
        # Three integers per pair: 24 MB for a million pairs.
        self._locations = array("q")
        for number, part in enumerate(parts):
            quarantine.notes += part.table.notes
            for row, place, pair, label in part.pairs(quarantine):
                if counted(pair, label, settings, quarantine) is not None:
                    self._locations.extend((number, row, place))

    def __len__(self) -> int:
        return len(self._locations) // 3

    def __getitem__(self, index: int) -> Pair:
        part, row, pair = self._location(index)
        return self.parts[part].pair(row, pair)

    def row(self, index: int) -> Row:
        """Return the row of the table that holds the pair at ``index``."""
        part, row, _ = self._location(index)
        return self.parts[part].table.row(row)

    def _location(self, index: int) -> tuple[int, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        return tuple(self._locations[3 * index : 3 * index + 3])

    def confirm(self, index: int, sample: Pair) -> None:
        """Raise ValueError if the pair's text or images changed after its AI label was made."""
        part, row, pair = self._location(index)
        labels = self.parts[part].labels
        if labels is not None:
            labels.check(f"{row}.{pair}", sample)


def open_part(
    source: str | Path | Dataset, settings: PreferenceDataConfig, formats: Mapping[str, Format] = FORMATS
) -> Part:
    """Open a source in one of ``formats``. Raises ValueError for an ambiguous format or a missing column."""
    if settings.labels and not isinstance(source, str | Path):
        raise ValueError("data.labels: AI labels name rows of files; write the data set to a file, and name that")
    table = open_table(source, settings)
    format = detect(table.columns, settings.format, formats, table.name)
    return Part(table, format, Labels.load(source, settings.labels) if settings.labels else None)


def open_pairs(*sources: str | Path | Dataset, settings: PreferenceDataConfig) -> PairData:
    """Open the pairs of ``sources`` without reading images. Raises ValueError if no source is named."""
    if not sources:
        raise ValueError("name at least one source of preference pairs: a file, a folder or a hub id")
    quarantine = Quarantine(settings.on_fault, settings.max_bad_share)
    return PairData([open_part(source, settings) for source in sources], settings, quarantine)


def load_pairs(*sources: str | Path | Dataset, settings: PreferenceDataConfig | None = None) -> PairData:
    """Load the pairs of ``sources`` and validate them; one ``DataWarning`` lists the dropped samples.

    Rows are read without their images; then the images of ``settings.scan`` pairs are decoded.

    Args:
        sources: Files, folders or hub ids, see ``tables``, or a ``datasets.Dataset``, in a format of
            ``formats.FORMATS``.
        settings: Reading options; default: ``PreferenceDataConfig()``.

    Raises:
        FileNotFoundError: A source or its AI labels do not exist.
        ValueError: No pair is usable, or more than ``max_bad_share`` are not.
    """
    return examined(open_pairs(*sources, settings=settings or PreferenceDataConfig()), named(sources))


def named(sources: Iterable[str | Path | Dataset]) -> str:
    """Name sources in a message."""
    return ", ".join(str(source) if isinstance(source, str | Path) else IN_MEMORY for source in sources)


def examined(data: S, where: str) -> S:
    """Validate the samples as ``load_pairs`` describes, and return them."""
    data.quarantine.enforce()
    if not len(data):
        lines = [f"{kind}: {count}" for kind, count in data.quarantine.skipped.items()] + data.quarantine.lines()
        raise ValueError(bounded("\n".join([f"{shorten(where)}: no sample is left", *lines])))
    data.examine(data.settings.scan)
    if lines := data.quarantine.lines():
        warnings.warn(bounded("\n".join([f"{shorten(where)}:", *lines])), DataWarning, stacklevel=3)
    return data
