"""Stream preference pairs that do not fit on disk, endlessly, in an order that can be resumed at any pair.

The order is a function of its address: in epoch e the shards (files) of all sources are visited in the order
permutation(n, e), and the k-th block of ``window`` rows of shard s in the order permutation(rows, e, s, k). A cursor is
therefore five integers, and resuming reads only the block that it points into, after skipping the rows before it in the
shard. A larger window shuffles better and holds more rows in memory; without a permutation rows keep their order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffalign.data.ai_labels import Labels
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import FORMATS, Format, detect
from diffalign.data.pairs import counted, noted, usable_images
from diffalign.data.row import Row
from diffalign.data.tables import Stream, open_stream
from diffalign.data.validation import DataWarning, Quarantine
from diffalign.files import bounded, shorten
from diffalign.structures import Pair

Permutation = Callable[..., Tensor]
ENOUGH = 1000  # rows; a fraction of fewer is too noisy to enforce


@dataclass(frozen=True, order=True)
class Cursor:
    """A position in the stream: the epoch, and the numbers of finished shards, blocks, rows and pairs within it."""

    epoch: int = 0
    shard: int = 0
    block: int = 0
    row: int = 0
    pair: int = 0

    def state(self) -> dict[str, int]:
        """Return a dict for JSON; ``Cursor(**state)`` restores the cursor."""
        return asdict(self)


@dataclass(frozen=True)
class StreamPart:
    """A source: its stream, its format, and AI labels that replace its own, if any."""

    stream: Stream
    format: Format
    labels: Labels | None = None

    def pairs(self, quarantine: Quarantine) -> Iterator[tuple[str, Pair, float | None]]:
        """Yield every pair as (key, pair, label) in file order, unlabelled ones too."""
        for shard in range(self.stream.shards):
            for row in self.stream.rows(shard):
                for index, (pair, label) in enumerate(noted(row, self.format, quarantine)):
                    yield f"{row.key}.{index}", pair, label


class PairStream:
    """An endless stream of the usable pairs of several sources.

    Args:
        parts: The sources.
        settings: Reading options.
        permutation: ``permutation(n, *address)`` returns the integers 0 to n - 1 in an order that depends on its
            arguments alone, e.g. ``lambda n, *address: rng.permutation(n, "data", *address)``.
        window: Rows per shuffled block.
        rank: Index of this process.
        world: Number of processes; each reads its own shards, so there must be at least as many shards.
    """

    def __init__(
        self,
        parts: list[StreamPart],
        settings: PreferenceDataConfig,
        permutation: Permutation | None = None,
        window: int = 256,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.parts, self.settings, self.permutation, self.window = parts, settings, permutation, window
        self.rank, self.world = rank, world
        self.shards = [(part, number) for part in parts for number in range(part.stream.shards)]
        self.quarantine = Quarantine(settings.on_fault, settings.max_bad_share)
        self.quarantine.notes += [note for part in parts for note in part.stream.notes]
        self.counted = Cursor(-1)  # the last row that the quarantine has counted
        if window < 1 or not 0 <= rank < world:
            raise ValueError(f"window must be at least 1, got {window}, and rank in [0, {world}), got {rank}")
        if len(self.shards) < world:
            raise ValueError(f"{len(self.shards)} files for {world} processes: split them into at least {world}")

    def pairs(self, cursor: Cursor | None = None) -> Iterator[tuple[Pair, Cursor]]:
        """Yield the usable pairs from ``cursor`` on, each with the cursor after it. ValueError: an epoch has none."""
        cursor = cursor or Cursor()
        while True:
            found = False
            for pair, after in self._epoch(cursor):
                found = True
                yield pair, after
            if not found and cursor == Cursor(cursor.epoch):
                raise ValueError(bounded("\n".join(["no pair can be used", *self.quarantine.lines()])))
            cursor = Cursor(cursor.epoch + 1)

    def load(self, cursor: Cursor | None = None) -> Iterator[tuple[Pair, tuple[Image.Image, ...], Cursor]]:
        """Yield pairs with images. A ``DataWarning`` names an unusable pair; ValueError: there are too many of them."""
        known = len(self.quarantine.dropped)
        for count, (pair, after) in enumerate(self.pairs(cursor), start=1):
            if (images := usable_images(pair, self.settings, self.quarantine)) is not None:
                yield pair, images, after
            elif len(self.quarantine.dropped) > known:
                warnings.warn(f"left out: {pair.key}: {self.quarantine.why(pair.key)}", DataWarning, stacklevel=2)
            if len(self.quarantine.dropped) > known and self.quarantine.rows >= ENOUGH:
                self.quarantine.enforce(max(count, self.quarantine.examined))
            known = len(self.quarantine.dropped)

    def once(self) -> Iterator[Pair]:
        """Yield the usable pairs of one epoch."""
        return (pair for pair, _ in self._epoch(Cursor()))

    def examine(self, limit: int | None) -> None:
        """Decode the images of the first ``limit`` pairs, or of all. Raises ValueError if too many are unusable."""
        for pair in islice(self.once(), limit):
            usable_images(pair, self.settings, self.quarantine, count_kept=True)
            self.quarantine.examined += 1
        self.quarantine.enforce()

    def _order(self, count: int, *address: int) -> list[int]:
        return list(range(count)) if self.permutation is None else self.permutation(count, *address).tolist()

    def _epoch(self, start: Cursor) -> Iterator[tuple[Pair, Cursor]]:
        mine = self._order(len(self.shards), start.epoch)[self.rank :: self.world]
        for index in range(start.shard, len(mine)):
            part, number = self.shards[mine[index]]
            first = start if index == start.shard else Cursor(start.epoch, index)
            yield from self._shard(part, number, mine[index], first)

    def _shard(self, part: StreamPart, number: int, address: int, start: Cursor) -> Iterator[tuple[Pair, Cursor]]:
        rows = part.stream.rows(number, start.block * self.window)
        here = start
        while block := list(islice(rows, self.window)):
            order = self._order(len(block), here.epoch, address, here.block)
            for index in range(here.row, len(block)):
                here = replace(here, row=index, pair=here.pair if index == here.row else 0)
                yield from self._row(part, block[order[index]], here)
            here = replace(here, block=here.block + 1, row=0, pair=0)

    def _row(self, part: StreamPart, row: Row, here: Cursor) -> Iterator[tuple[Pair, Cursor]]:
        at = replace(here, pair=0)
        again = here.epoch > 0 or at <= self.counted
        # Count the errors of a row once, however often it is read.
        quarantine = Quarantine(self.settings.on_fault) if again else self.quarantine
        self.counted = max(self.counted, at)
        for index, (pair, label) in enumerate(noted(row, part.format, quarantine)):
            if part.labels is not None:
                label = part.labels.of_content(pair)
            if index < here.pair:
                continue
            if (used := counted(pair, label, self.settings, quarantine)) is not None:
                yield used, replace(here, pair=index + 1)


def open_stream_part(source: str | Path, settings: PreferenceDataConfig) -> StreamPart:
    """Open a source of pairs as a stream. Raises ValueError for an ambiguous format or a missing column."""
    opened = open_stream(source, settings)
    format = detect(opened.columns, settings.format, FORMATS, opened.name)
    return StreamPart(opened, format, Labels.load(source, settings.labels) if settings.labels else None)


def stream_pairs(
    *sources: str | Path,
    settings: PreferenceDataConfig | None = None,
    permutation: Permutation | None = None,
    window: int = 256,
    rank: int = 0,
    world: int = 1,
) -> PairStream:
    """Open the pairs of ``sources`` as an endless stream: see ``PairStream``, and ``load_pairs`` for the errors.

    The images of the first ``settings.scan`` pairs are decoded before the stream is returned.
    """
    settings = settings or PreferenceDataConfig()
    if not sources:
        raise ValueError("name at least one source of preference pairs: a file, a folder or a hub id")
    parts = [open_stream_part(source, settings) for source in sources]
    stream = PairStream(parts, settings, permutation, window, rank, world)
    stream.examine(settings.scan)
    if lines := stream.quarantine.lines():
        text = "\n".join([f"{shorten(', '.join(map(str, sources)))}:", *lines])
        warnings.warn(bounded(text), DataWarning, stacklevel=2)
    return stream
