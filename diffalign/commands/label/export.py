"""Write answers as a preference table in Pick-a-Pic's columns, with a row per answer as that data set has."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from diffalign import media
from diffalign.atomic import replacing
from diffalign.commands.label.answers import Answer, identify
from diffalign.commands.label.comparison import Comparison
from diffalign.data.images import source_image
from diffalign.data.row import EXPORTED_SOURCE
from diffalign.structures import ImageSource

ROWS = 100  # per row group: both images of a row are read together
COLUMNS = {
    "caption": "string",
    "jpg_0": "binary",  # as the image files are, whatever their format
    "jpg_1": "binary",
    "image_0_uid": "string",
    "image_1_uid": "string",
    "label_0": "float64",
    "label_1": "float64",
    "best_image_uid": "string",
    "has_label": "bool",
    "are_different": "bool",
    "model_0": "string",
    "model_1": "string",
    "user_id": "string",
    "ranking_id": "int64",
    "num_example_per_prompt": "int64",
    "created_at": "string",
    "answer": "string",
    "seconds": "float64",
    "metadata": "string",
}


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        rows: Rows of the table.
        ties: Rows with a label of 0.5.
        unused: Reason -> answers that are not in the table.
    """

    rows: int = 0
    ties: int = 0
    unused: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Format the reasons, a line each."""
        return [f"{count} answers left out: {reason}" for reason, count in self.unused.items()]


def digest_images(pair: Comparison) -> tuple[str, str]:
    """Hash the files of both images. ValueError: one cannot be read."""
    first, second = (hashlib.blake2b(read_image(image), digest_size=16).hexdigest() for image in pair.images)
    return first, second


def read_image(image: ImageSource) -> bytes:
    """Read the file of an image. ValueError: it cannot be read."""
    try:
        return image.read()
    except media.BROKEN as error:
        raise ValueError(f"{image.name} cannot be read: {media.reason(error)}") from error


def export(path: Path, pairs: Sequence[Comparison], answers: Sequence[Answer], both_bad: str) -> Exported:
    """Write the answers that decide something about pairs whose text and images are as they were shown.

    No file is written without a row; an earlier one stays.

    Args:
        path: A .parquet file.
        pairs: The pairs of the sources.
        answers: The answers that stand.
        both_bad: "tie" or "drop".
    """
    import pyarrow as arrow
    from pyarrow import parquet

    made = Exported()
    rows = _rows(pairs, answers, both_bad, made)
    first = next(rows, None)
    if first is None:
        return made
    edits = any(source_image(pair.prompt) is not None for pair in pairs)
    columns = {**COLUMNS, **({EXPORTED_SOURCE: "binary"} if edits else {})}
    schema = arrow.schema(
        [(name, getattr(arrow, "bool_" if kind == "bool" else kind)()) for name, kind in columns.items()]
    )
    with replacing(path) as staged, parquet.ParquetWriter(staged, schema) as writer:
        rows = chain([first], rows)
        while block := list(islice(rows, ROWS)):
            writer.write_table(arrow.Table.from_pylist(block, schema=schema))
            made.rows += len(block)
            made.ties += sum(row["label_0"] == 0.5 for row in block)
    return made


def _rows(
    pairs: Sequence[Comparison], answers: Sequence[Answer], both_bad: str, made: Exported
) -> Iterator[dict[str, Any]]:
    known = {pair.key: (number, pair) for number, pair in enumerate(pairs)}
    prompts = Counter(answer.prompt for answer in answers)
    spelled = {identify(answer.rater): answer.rater for answer in reversed(answers)}  # as at first
    for answer in answers:
        if answer.value is None or (answer.choice == "bad" and both_bad == "drop"):
            made.unused["skipped" if answer.value is None else "both bad"] += 1
            continue
        number, pair = known.get(answer.pair, (0, None))
        if pair is None:
            made.unused["their pairs are not among the sources of this command"] += 1
            continue
        source = source_image(pair.prompt)
        try:
            contents = [read_image(image) for image in pair.images]
            edited = None if source is None else read_image(source)
        except ValueError:
            made.unused["an image can no longer be read"] += 1
            continue
        found = tuple(hashlib.blake2b(content, digest_size=16).hexdigest() for content in contents)
        if found != answer.content or answer.prompt != pair.prompt.text:
            made.unused["the images or the text changed since"] += 1
            continue
        yield {
            **_judgement(pair, answer),
            "user_id": spelled[identify(answer.rater)],
            "jpg_0": contents[0],
            "jpg_1": contents[1],
            "ranking_id": number,
            "num_example_per_prompt": prompts[answer.prompt],
            EXPORTED_SOURCE: edited,
        }


def _judgement(pair: Comparison, answer: Answer) -> dict[str, Any]:
    value = answer.value
    assert value is not None
    own = dict(pair.prompt.metadata)
    if source_image(pair.prompt) is not None:  # a column of its own holds it
        del own["image"]
    metadata = json.dumps(own, default=str) if own else None
    return {
        "caption": answer.prompt,
        "image_0_uid": answer.content[0],
        "image_1_uid": answer.content[1],
        "label_0": value,
        "label_1": 1 - value,
        "best_image_uid": {1.0: answer.content[0], 0.0: answer.content[1]}.get(value, "tie"),
        "has_label": True,
        "are_different": answer.content[0] != answer.content[1],
        "model_0": pair.models[0],
        "model_1": pair.models[1],
        "created_at": answer.at,
        "answer": answer.choice,
        "seconds": answer.seconds,
        "metadata": metadata,
    }
