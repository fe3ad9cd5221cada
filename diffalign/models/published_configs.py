"""Published configurations of the supported models, for work on their shapes without network or weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "published"
REWARDS = FOLDER / "rewards"


def published_models() -> list[str]:
    """List the hub ids whose configurations the package holds."""
    return sorted(path.name.replace("--", "/") for path in FOLDER.iterdir() if path.is_dir() and path != REWARDS)


def published_folder(name: str | Path) -> Path | None:
    """Return the folder with the configurations of a hub id in diffusers' layout; None for other models."""
    folder = FOLDER / str(name).replace("/", "--")
    return folder if str(name).count("/") == 1 and folder.is_dir() else None


def published_reward_folder(name: str) -> Path | None:
    """Return the folder with the configurations of a reward's network by hub id; None for others."""
    folder = REWARDS / name.replace("/", "--")
    return folder if name.count("/") == 1 and folder.is_dir() else None


def published_config(name: str, part: str) -> dict[str, Any]:
    """Return the configuration of one part of a published model, such as "scheduler" or "transformer".

    Raises:
        ValueError: The package has no such model, or the model no such part.
    """
    folder = published_folder(name)
    files = [] if folder is None else list((folder / part).glob("*.json"))
    if not files:
        raise ValueError(f"no published configuration of {name}, {part}; known: {', '.join(published_models())}")
    found: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    return found
