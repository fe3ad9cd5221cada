"""Small data in the columns and files of the real sets."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

# The columns of yuvalkirstain/pickapic_v2, in its order; v1 has the same.
PICK_A_PIC = Features(
    {
        "are_different": Value("bool"),
        "best_image_uid": Value("string"),
        "caption": Value("string"),
        "created_at": Value("timestamp[ns]"),
        "has_label": Value("bool"),
        "image_0_uid": Value("string"),
        "image_0_url": Value("string"),
        "image_1_uid": Value("string"),
        "image_1_url": Value("string"),
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "label_0": Value("float64"),
        "label_1": Value("float64"),
        "model_0": Value("string"),
        "model_1": Value("string"),
        "ranking_id": Value("int64"),
        "user_id": Value("int64"),
        "num_example_per_prompt": Value("int64"),
        "__index_level_0__": Value("int64"),
    }
)


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Noise, (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@cache
def encoded(seed: int, size: tuple[int, int] = (24, 20), kind: str = "JPEG") -> bytes:
    """The bytes of ``picture``."""
    file = io.BytesIO()
    picture(seed, size).save(file, kind)
    return file.getvalue()


def pick_row(number: int, label: float | None = 1.0, **changes) -> dict:
    """A row of Pick-a-Pic, with images 2 number and 2 number + 1."""
    row = {
        "are_different": True,
        "best_image_uid": f"uid-{2 * number}",
        "caption": f"caption {number}",
        "created_at": None,
        "has_label": True,
        "image_0_uid": f"uid-{2 * number}",
        "image_0_url": "https://nowhere.invalid/0.png",
        "image_1_uid": f"uid-{2 * number + 1}",
        "image_1_url": "https://nowhere.invalid/1.png",
        "jpg_0": encoded(2 * number),
        "jpg_1": encoded(2 * number + 1),
        "label_0": label,
        "label_1": None if label is None else 1 - label,
        "model_0": "a",
        "model_1": "b",
        "ranking_id": number,
        "user_id": 1,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    }
    return row | changes


def pick_a_pic(path: Path, rows: list[dict]) -> Path:
    """A Parquet file of such rows."""
    Dataset.from_list(rows, features=PICK_A_PIC).to_parquet(path)
    return path


def image_table(path: Path, rows: list[dict], images: tuple[str, ...]) -> Path:
    """A Parquet file whose ``images`` columns are image features, as the hub has them."""
    plain = Dataset.from_list([{key: row[key] for key in row if key not in images} for row in rows]).features
    features = Features({**{name: ImageFeature() for name in images}, **plain})
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def jsonl(path: Path, rows: list[dict]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def captions(data) -> list[str]:
    """The texts of samples, in order."""
    return [data[i].prompt.text for i in range(len(data))]
