"""Locate the configurations and the embedded world, in a clone or in an installed package.

Both are part of the package. ``assets/...``, where the working folder has no such file, is that of the package;
``model: shapes-sd3`` and ``--config flow_grpo/shapes`` name a model and a configuration of it from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
ASSETS, CONFIGS = "assets", "configs"
MODELS = ("shapes-sd3", "shapes-sd", "shapes-kontext")
MODEL_FIELDS = ("model", "models")


@cache
def root() -> Path:
    """Return the folder of ``assets/`` and ``configs/``: a clone, else the installed package."""
    clone = PACKAGE.parent
    return clone if (clone / "pyproject.toml").is_file() and (clone / CONFIGS).is_dir() else PACKAGE


def located(value: Any, field: str = "") -> Any:
    """Replace the paths within the value of a field that name files of the package."""
    if isinstance(value, str | Path):
        return value if field.startswith("output") else _path(value, field)
    if isinstance(value, tuple | list):
        return type(value)(located(item, field) for item in value)
    if type(value) is dict:
        return {name: located(item) for name, item in value.items()}
    return value


def _path(value: str | Path, field: str) -> str | Path:
    text = f"{ASSETS}/{value}" if field in MODEL_FIELDS and str(value) in MODELS else str(value)
    file = text.partition("?")[0]  # of a prompt source such as prompts.jsonl?limit=60
    if not text.startswith(f"{ASSETS}/") or Path(value).exists() or Path(file).exists() or not (root() / file).exists():
        return value
    return type(value)(root() / text)


def config_file(name: str) -> Path:
    """Return the path of a configuration of the package. ValueError: there is none of that name."""
    path = root() / CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if not path.resolve().is_relative_to((root() / CONFIGS).resolve()) or not path.is_file():
        raise ValueError(f"there is no configuration {name!r}: `diffalign configs` lists all")
    return path


def config_names() -> Iterator[tuple[str, str]]:
    """Yield (name, first sentence of its comment) of each configuration, sorted."""
    folder = root() / CONFIGS
    for path in sorted(folder.rglob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        begin = int(lines[0].startswith("# yaml-language-server"))
        comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines[begin:]))
        yield path.relative_to(folder).with_suffix("").as_posix(), f"{comment.split('. ')[0].rstrip('.')}."
