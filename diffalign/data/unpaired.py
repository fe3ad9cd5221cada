"""Single images labelled as liked or not, for unpaired losses such as Diffusion-KTO (arXiv 2404.04465)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import FORMATS, UNPAIRED, Format
from diffalign.data.images import digest
from diffalign.data.pairs import Part, Samples, counted, examined, named, open_part
from diffalign.data.row import Row
from diffalign.data.validation import Quarantine, SampleError
from diffalign.structures import ImageSource, Input, LabelledImage, Pair

if TYPE_CHECKING:
    from datasets import Dataset


def identity(image: ImageSource) -> str:
    """Identify an image by its id in the data, else by a hash of its content."""
    return digest(image) if image.identity is None else image.identity


def unpair(pairs: Iterable[Pair]) -> dict[tuple[Input, str], tuple[int, int, bool]]:
    """Split pairs into single images: (input, identity) -> (index of the pair, side, liked), in the order of the pairs.

    An image that won once for an input, a text with its source image, is liked, however often it lost. Ties are
    ignored.
    """
    found: dict[tuple[Input, str], tuple[int, int, bool]] = {}
    for number, pair in enumerate(pairs):
        for side, image in enumerate(pair.images):
            if not pair.tie:
                key = (pair.prompt.input, identity(image))
                entry = found.get(key, (number, side, False))
                found[key] = (*entry[:2], entry[2] or (pair.label > 0.5) == (side == 0))
    return found


def labelled_row(row: Row, format: Format) -> LabelledImage:
    """Read the image of a row of an unpaired format. Raises SampleError as the format's reader does."""
    ((image, liked),) = format.read(row)
    return LabelledImage(row.name, row.prompt(), image, liked, row.mask())


FIELDS = 5  # integers per image: source, row, pair in the row, side, liked


class LabelledData(Samples[LabelledImage]):
    """Single images with labels, from pairs or unpaired sources; otherwise as ``PairData``."""

    def __init__(self, parts: list[Part], settings: PreferenceDataConfig, quarantine: Quarantine) -> None:
        super().__init__(settings, quarantine)
        self.parts = parts
        # Packed FIELDS per image.
        self._locations = array("q")
        for number, part in enumerate(parts):
            quarantine.notes += part.table.notes
            for location in self._plain(part) if part.format in UNPAIRED.values() else self._unpaired(part):
                self._locations.extend((number, *location))

    def __len__(self) -> int:
        return len(self._locations) // FIELDS

    def __getitem__(self, index: int) -> LabelledImage:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = FIELDS * (index % len(self))
        number, row, pair_index, side, liked = self._locations[start : start + FIELDS]
        part = self.parts[number]
        if part.format in UNPAIRED.values():
            return labelled_row(part.table.row(row), part.format)
        pair = part.pair(row, pair_index)
        return LabelledImage(f"{pair.key}, image {side}", pair.prompt, pair.images[side], bool(liked), pair.mask)

    @property
    def liked_indices(self) -> list[int]:
        """Return the indices of the liked images, ascending."""
        return [index for index, liked in enumerate(self._locations[4::FIELDS]) if liked]

    def liked(self) -> LabelledData:
        """Select the liked images. Raises ValueError if there are none."""
        subset = copy(self)
        subset._locations = array("q")
        for index in self.liked_indices:
            subset._locations.extend(self._locations[FIELDS * index : FIELDS * (index + 1)])

        if not len(subset):
            raise ValueError(f"none of {len(self)} images is liked: look at their labels with diffalign check")
        return subset

    def _plain(self, part: Part) -> Iterator[tuple[int, int, int, int]]:
        for number, row in enumerate(part.table.rows()):
            self.quarantine.rows += 1
            try:
                sample = labelled_row(row, part.format)
            except SampleError as error:
                self.quarantine.keeps(error)
                continue
            if sample.prompt.text or self.quarantine.keeps(row.error("empty_caption", "prompt", "empty")):
                yield number, 0, 0, int(sample.liked)

    def _unpaired(self, part: Part) -> list[tuple[int, int, int, int]]:
        where: list[tuple[int, int]] = []

        def judged() -> Iterator[Pair]:
            for row, place, pair, label in part.pairs(self.quarantine):
                if (used := counted(pair, label, self.settings, self.quarantine)) is not None:
                    try:
                        first, second = (replace(image, identity=identity(image)) for image in pair.images)
                    except SampleError as error:
                        self.quarantine.keeps(SampleError(error.kind, pair.key, error.detail))
                        continue
                    where.append((row, place))
                    yield replace(used, images=(first, second))

        return [(*where[number], side, int(liked)) for number, side, liked in unpair(judged()).values()]


def open_labelled(*sources: str | Path | Dataset, settings: PreferenceDataConfig) -> LabelledData:
    """Open the single images of ``sources`` without reading images. Raises ValueError if no source is named."""
    if not sources:
        raise ValueError("name at least one source of labelled images: a file, a folder or a hub id")
    quarantine = Quarantine(settings.on_fault, settings.max_bad_share)
    parts = [open_part(source, settings, {**FORMATS, **UNPAIRED}) for source in sources]
    return LabelledData(parts, settings, quarantine)


def load_labelled(*sources: str | Path | Dataset, settings: PreferenceDataConfig | None = None) -> LabelledData:
    """Load the single images of unpaired sources or of pairs (see ``unpair``), validated as by ``load_pairs``."""
    return examined(open_labelled(*sources, settings=settings or PreferenceDataConfig()), named(sources))
