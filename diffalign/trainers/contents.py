"""Fingerprints of the local files that a run depends on: model, data, prompts and rewards."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.config.sections import JUDGE, JUDGE_FILES
from diffalign.data.ai_labels import labels_path
from diffalign.data.images import portable_metadata, source_image
from diffalign.data.pairs import Samples
from diffalign.data.prompt_source import parse_source
from diffalign.lora_source import lora_file
from diffalign.models import DiffusionModel
from diffalign.models.editing import check_source_column, check_sources
from diffalign.models.single_file import layout, single_file
from diffalign.remote import mapped, shown
from diffalign.rewards.config import RewardConfig
from diffalign.rewards.support.weights import Weights
from diffalign.runtime.fingerprint import MODEL_FILES, fingerprint, of_bytes
from diffalign.runtime.provenance import WITH_PATHS
from diffalign.structures import ImageSource, Prompt

Fingerprints = dict[str, dict[str, str]]
PACKAGE = Path(__file__).parents[1]
DEPTH = 4  # of attributes in which a reward keeps the paths of its weights
# Samples whose images are read, and samples of which all else is read: a second at most for large data sets.
READ, SEEN = 256, 2000


def contents(args: Any, rewards: Mapping[str, Any]) -> Fingerprints:
    """Return the fingerprints of all local files that a configuration and its rewards name.

    Repositories of the hub are known by their commits, and are not among them.
    """
    base = layout(args.model)
    found = {f"model {base}": fingerprint(base, MODEL_FILES)}
    if (one := single_file(args.model)) is not None:
        found[f"model {one.name}"] = fingerprint(one.path())
    if args.lora.init and Path(args.lora.init).exists():
        found[f"lora.init {args.lora.init}"] = fingerprint(lora_file(Path(args.lora.init)))
    for name in ("train_prompts", "eval_prompts"):
        if (source := getattr(args, name, None)) and (file := parse_source(source).path):
            found[f"{name} {shown(file)}"] = fingerprint(file)
    if rollouts := getattr(args, "train_rollouts", None):
        found[f"train_rollouts {shown(rollouts)}"] = fingerprint(mapped(rollouts))
    for name in ("train_data", "train_images"):
        for source in getattr(args, name, ()):
            found[f"{name} {source}"] = fingerprint(mapped(source))
            if args.data.labels and os.path.exists(source):
                labels = labels_path(source, args.data.labels)
                found[f"labels {labels}"] = fingerprint(labels)
    for path in {*_paths([rewards, *_tables(args)]), *_code(args)}:
        found[f"reward file {path}"] = fingerprint(path, MODEL_FILES)
    return {name: content for name, content in found.items() if content is not None}


def sample_contents(data: Samples) -> dict[str, str]:
    """Return the fingerprint of samples: texts, metadata and labels of ``SEEN``, images of ``READ``, spread evenly."""
    count = len(data)
    seen, read = min(count, SEEN), min(count, READ)
    samples = [data[number * count // seen] for number in range(seen)]
    rows = [_row(sample, portable_metadata(sample.prompt)) for sample in samples]
    old = [_row(sample, sample.prompt.metadata) for sample in samples]
    chosen = (data[number * count // read] for number in range(read))
    seen_images = ((*sample.images, sample.mask, source_image(sample.prompt)) for sample in chosen)
    images = [_image(image) for own in seen_images for image in own if image is not None]
    found = of_bytes((str(count).encode(), *rows, *images))
    return found if rows == old else {**found, WITH_PATHS: of_bytes((str(count).encode(), *old, *images))["content"]}


def source_contents(prompts: Sequence[Prompt]) -> Fingerprints:
    """Return the fingerprint of the source images of prompts, of ``READ`` files spread evenly; empty without one."""
    sources = {source.content: source for prompt in prompts if (source := source_image(prompt)) is not None}
    if not sources:
        return {}
    chosen, read = list(sources.values()), min(len(sources), READ)
    images = (_image(chosen[number * len(chosen) // read]) for number in range(read))
    return {"source images of train_prompts": of_bytes((str(len(chosen)).encode(), *images))}


def check_sample_sources(model: DiffusionModel, data: Samples) -> None:
    """Check the source images of ``READ`` samples, spread evenly, for a model that edits.

    Raises:
        ValueError: A sample without a source image, or with a file that is missing or no image; or a column of sources
            for a model that does not edit.
    """
    check_source_column(model, data.settings.source)
    count = len(data) if model.edits else 0
    read = min(count, READ)
    check_sources(model, (data[number * count // read].prompt for number in range(read)))


def _row(sample: Any, metadata: Mapping[str, Any]) -> bytes:
    labels = getattr(sample, "label", None), getattr(sample, "liked", None)
    return json.dumps([sample.key, sample.prompt.text, metadata, labels], default=str).encode()


def _image(source: ImageSource) -> bytes:
    try:
        return source.read()
    except (OSError, ValueError):  # a bad sample, which is left out with a warning when it is used
        return b""


def _tables(args: Any) -> Iterator[Mapping[str, Any]]:
    yield from (getattr(args, name, {}) for name in ("rewards", "held_out"))


def _code(args: Any) -> Iterator[str]:
    """Yield the files of rewards that a configuration names as code."""
    names = [*getattr(args, "eval_rewards", ())]
    for table in _tables(args):
        names += [(entry.reward if isinstance(entry, RewardConfig) else "") or name for name, entry in table.items()]
    for where in (name.rpartition(":")[0] for name in names if ":" in name):
        file = where if where.endswith(".py") else getattr(sys.modules.get(where), "__file__", None)
        if file and not Path(file).resolve().is_relative_to(PACKAGE):
            yield str(file)


def _paths(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the local paths in a reward, a configuration or a container of them."""
    if isinstance(value, Weights):
        value = Path(value.path)
        if (value / JUDGE_FILES[0]).is_file() and (value / f"{JUDGE}.json").is_file():
            # A run folder holds more, such as checkpoints, which may go.
            yield from (str(value / name) for name in JUDGE_FILES if (value / name).is_file())
            return
    if isinstance(value, (str, Path)):
        named = isinstance(value, Path) or os.sep in value or os.path.splitext(value)[1] in MODEL_FILES
        if named and 0 < len(str(value)) < 1000 and "\0" not in str(value) and os.path.exists(value):
            yield str(value)
        return
    if depth < DEPTH:
        for entry in _entries(value):
            yield from _paths(entry, depth + 1)


def _entries(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    # Attributes of rewards only: networks and tensors hold nothing that names a file.
    own = type(value).__module__.split(".")[0] in ("diffalign", "__main__") or callable(value)
    return list(vars(value).values()) if own and hasattr(value, "__dict__") and not isinstance(value, type) else []
