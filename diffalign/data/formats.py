"""Formats of published preference data sets: readers from a row to labelled pairs of images.

A reader yields (first image, second image, label) for each pair of a row: the label is the probability that the first
image is preferred, or None for an unlabelled pair. To add a format, write such a function and an entry in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from diffalign.data.row import PROMPTS, Row
from diffalign.files import shorten, some
from diffalign.structures import ImageSource

Judgement = tuple[ImageSource, ImageSource, float | None]


@dataclass(frozen=True)
class Format:
    """A table format.

    Attributes:
        columns: Required columns; a tuple names alternatives, of which one is enough.
        read: Reader of a row.
    """

    columns: tuple[str | tuple[str, ...], ...]
    read: Callable[[Row], Iterator[Any]]

    def missing(self, columns: Sequence[str]) -> list[str]:
        """List the required columns that a table lacks, alternatives as "a or b"."""
        needed = [(column,) if isinstance(column, str) else column for column in self.columns]
        return [" or ".join(names) for names in needed if not set(names) & set(columns)]


def pick_a_pic(row: Row) -> Iterator[Judgement]:
    """Read Pick-a-Pic v1 and v2 (arXiv 2305.01569): bytes in jpg_0 and jpg_1, label_0 in {0, 0.5, 1}."""
    unjudged = row.flag("has_label") is False
    label = None if unjudged else row.choice("label_0", (0, 0.5, 1))
    first, second = (row.image(f"jpg_{side}", row.values.get(f"image_{side}_uid")) for side in (0, 1))
    yield first, second, label


def hpdv2(row: Row) -> Iterator[Judgement]:
    """Read train.json and test.json of HPDv2 (arXiv 2306.09341).

    A training row has two images and human_preference, 1 for the preferred one and 0 for the other. A test row has nine
    or ten images and their averaged ranks, 0 for the best: every two of them are a pair.
    """
    column = row.first(("image", "image_path", "file_path"))
    preference, rank = row.cell("human_preference"), row.cell("rank")
    if preference:
        if preference not in ([0, 1], [1, 0]):
            raise row.error("bad_label", "human_preference", f"{shorten(preference, 60)} is not [1, 0] or [0, 1]")
        rank = [1 - value for value in preference]
    elif not rank:
        raise row.error("bad_label", "rank", "neither human_preference nor rank is given")
    if not isinstance(rank, list) or not all(isinstance(value, (int, float)) for value in rank):
        raise row.error("bad_label", "rank", f"{shorten(rank, 60)} is not a list of numbers")
    cell = row.cell(column)
    count = len(cell) if isinstance(cell, (list, tuple)) else int(cell is not None)
    if not callable(cell) and count != len(rank):
        raise row.error("bad_row", column, f"{count} images for {len(rank)} ranks")
    for first, second in combinations(range(len(rank)), 2):
        label = 0.5 + 0.5 * ((rank[first] < rank[second]) - (rank[first] > rank[second]))
        yield row.image(column, index=first), row.image(column, index=second), label


def hpdv3(row: Row) -> Iterator[Judgement]:
    """Read HPDv3 (arXiv 2508.03789): path1 is preferred to path2, by the larger share of the votes in choice_dist.

    choice_dist lists the votes in either order. Without it the label is 1.
    """
    votes = row.cell("choice_dist")
    if votes and not (
        isinstance(votes, (list, tuple))
        and len(votes) == 2
        and all(isinstance(count, (int, float)) and count >= 0 for count in votes)
        and sum(votes)
    ):
        raise row.error("bad_label", "choice_dist", f"{shorten(votes, 60)} are not the votes for two images")
    yield row.image("path1"), row.image("path2"), max(votes) / sum(votes) if votes else 1.0


def chosen_rejected(row: Row) -> Iterator[Judgement]:
    """Read chosen and rejected images, as in open-image-preferences-v1-binarized: the label is 1."""
    yield row.image("chosen"), row.image("rejected"), 1.0


def pairs(row: Row) -> Iterator[Judgement]:
    """Read diffalign's own format: image_0, image_1 and label, the probability that image_0 is preferred."""
    yield row.image("image_0"), row.image("image_1"), row.probability("label")


FORMATS: dict[str, Format] = {
    "pick_a_pic": Format(("jpg_0", "jpg_1", "label_0", PROMPTS), pick_a_pic),
    "hpdv2": Format((("image", "image_path", "file_path"), ("human_preference", "rank"), PROMPTS), hpdv2),
    "hpdv3": Format(("path1", "path2", PROMPTS), hpdv3),
    "chosen_rejected": Format(("chosen", "rejected", PROMPTS), chosen_rejected),
    "pairs": Format(("image_0", "image_1", "label", PROMPTS), pairs),
}


def _maybe_labelled(row: Row) -> Iterator[Judgement]:
    """Read a row of Pick-a-Pic, also without a label."""
    if row.cell("label_0") is None:
        yield row.image("jpg_0", row.values.get("image_0_uid")), row.image("jpg_1", row.values.get("image_1_uid")), None
    else:
        yield from pick_a_pic(row)


# The same formats, of which those with a column of labels do not need it.
LABELLESS: dict[str, Format] = {
    **FORMATS,
    "pick_a_pic": Format(("jpg_0", "jpg_1", PROMPTS), _maybe_labelled),
    "pairs": Format(("image_0", "image_1", PROMPTS), pairs),
}

# Labels of single images: numbers, and the splits of Diffusion-KTO's tables (arXiv 2404.04465).
LIKED: dict[Any, bool] = {1: True, 0: False, "exclusive_win": True, "intersections": True, "exclusive_lose": False}


def liked(row: Row) -> Iterator[tuple[ImageSource, bool]]:
    """Read an image and its label: 1 or 0, or a split of Diffusion-KTO."""
    column = row.first(("liked", "label", "split", "score"))
    value = row.cell(column)
    known = row.flag(column) if not isinstance(value, str) or value not in LIKED else LIKED[value]
    if known is None:
        raise row.error("bad_label", column, f"{shorten(repr(value), 60)} is not one of {', '.join(map(str, LIKED))}")
    yield row.image(row.first(("image", "file_name", "file_path"))), known


UNPAIRED: dict[str, Format] = {
    "liked": Format((("image", "file_name", "file_path"), ("liked", "label", "split", "score"), PROMPTS), liked)
}


def detect(columns: Sequence[str], wanted: str, formats: Mapping[str, Format], where: str) -> Format:
    """Select the format of a table: by name, or with "auto" the only one whose required columns exist.

    Args:
        columns: Columns of the table.
        wanted: Name of a format, or "auto".
        formats: Known formats by name.
        where: Source, for messages.

    Raises:
        ValueError: An unknown name, a missing column, or no format or several that fit.
    """
    if wanted != "auto" and wanted not in formats:
        raise ValueError(f"unknown format {wanted!r}; known: auto, {', '.join(formats)}")
    if wanted != "auto":
        if lacking := formats[wanted].missing(columns):
            raise ValueError(
                f"{where}: format {wanted} needs the column {', '.join(lacking)}; there are {some(columns, 30, 40)}. "
                "Rename one, or name another format"
            )
        return formats[wanted]
    fitting = [name for name in formats if not formats[name].missing(columns)]
    if len(fitting) == 1:
        return formats[fitting[0]]
    if fitting:
        raise ValueError(f"{where}: its columns fit {' and '.join(fitting)}; choose one with format")
    needs = "; ".join(f"{name} lacks {', '.join(format.missing(columns))}" for name, format in formats.items())
    raise ValueError(f"{where}: columns {some(columns, 30, 40)} fit no format ({needs}). Rename some, or name a format")
