"""The prompts of a saved rollout buffer, with copies of the source images of edits, so that its folder can be moved."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.atomic import replacing, write_text
from diffalign.files import read_bytes, read_text
from diffalign.structures import Prompt

LARGEST = 1 << 30  # bytes of the prompts that are read
FILE, SOURCES = "prompts.json", "sources"


def copy_sources(prompts: Sequence[Prompt], directory: Path) -> list[Prompt]:
    """Copy source images into ``sources/`` of a folder; return the prompts with an "image" relative to the folder.

    Prompts without a source image stay as they are. Files are named by their content, so that equal ones are one.
    """
    return [_copied(prompt, directory) for prompt in prompts]


def _copied(prompt: Prompt, directory: Path) -> Prompt:
    image = prompt.metadata.get("image")
    if not isinstance(image, str) or not os.path.isfile(image):
        return prompt
    content = read_bytes(Path(image))
    name = f"{SOURCES}/{hashlib.blake2b(content, digest_size=16).hexdigest()}.img"  # no picture of the set
    if not (directory / name).is_file():
        (directory / SOURCES).mkdir(exist_ok=True)
        with replacing(directory / name) as staged:
            staged.write_bytes(content)
    return replace(prompt, metadata={**prompt.metadata, "image": name})


def write_prompts(prompts: Sequence[Prompt], directory: Path) -> None:
    """Write the prompts of a buffer."""
    write_text(directory / FILE, json.dumps([{"text": p.text, "metadata": dict(p.metadata)} for p in prompts]))


def read_prompts(directory: Path) -> list[Prompt]:
    """Read the prompts of a saved buffer. FileNotFoundError: no such file. ValueError: it is something else."""
    path = directory / FILE
    try:
        return [_located(Prompt(**entry), directory) for entry in json.loads(read_text(path, LARGEST))]
    except FileNotFoundError:
        raise
    except (AttributeError, OSError, TypeError, ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{path} holds no prompts of rollouts ({problem}): copy the folder again") from error


def _located(prompt: Prompt, directory: Path) -> Prompt:
    image = prompt.metadata.get("image")
    if not isinstance(image, str) or not image.startswith(f"{SOURCES}/") or not (directory / image).is_file():
        return prompt
    return replace(prompt, metadata={**prompt.metadata, "image": str((directory / image).absolute())})
