"""``diffalign relabel``: label preference pairs with rewards; labels are stored beside the data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.commands.relabel_config import RelabelConfig
from diffalign.commands.resume import drop_partial_line, read_rows
from diffalign.data.ai_labels import RULES, labels_path, read_table, write_table
from diffalign.data.formats import FORMATS, Format
from diffalign.data.images import content_key, fetched, to_uint8
from diffalign.data.pairs import open_part, usable_images
from diffalign.data.stream import open_stream_part
from diffalign.data.validation import Quarantine, SampleError
from diffalign.device import default_device
from diffalign.files import bounded, shorten
from diffalign.rewards.base import Reward, needs_groups
from diffalign.rewards.config import RewardConfig, build_rewards
from diffalign.rollout.scoring import score
from diffalign.structures import Pair

Scores = dict[str, float | None]  # "NAME/0" and "NAME/1": reward NAME of the first and the second image


def relabel(source: str | Path, config: RelabelConfig, formats: Mapping[str, Format] = FORMATS) -> Path:
    """Score every pair of ``source`` and write its labels, see ``data.ai_labels``.

    Pairs are identified by content: those already scored by these rewards, in an interrupted run or another version of
    the data, are not scored again. Unreadable pairs get no label. formats: those that the source may have.

    Returns:
        The file of labels.

    Raises:
        ValueError: As ``load_pairs``, or no pair can be scored.
    """
    rewards, weights = build_rewards(config.judges(), config.allow_reward_code)
    path, about = labels_path(source, config.labels), {"rewards": _recipes(config)}
    store = ScoreStore(path, about)
    quarantine = Quarantine(config.on_fault, config.max_bad_share)
    order: list[tuple[str, str]] = []

    with store.file:
        for batch in _batches(
            _pending(_all_pairs(source, config, quarantine, formats), config, quarantine, store, order),
            config.batch_size,
        ):
            for entry, scores in zip(batch, judge(rewards, batch), strict=True):
                store.add(entry.content, scores)

    rows = [_row(key, content, store.known.get(content, {}), weights, config) for key, content in order]
    if not rows:
        text = "\n".join([f"{shorten(source)}: no pair can be scored", *quarantine.lines()])
        raise ValueError(bounded(text))
    write_table(path, rows, {**about, "weights": weights, "rule": config.rule, "scale": config.scale})
    store.close()
    print("\n".join([f"{path}: {_summary(rows)}", *quarantine.lines()]))
    return path


@dataclass(frozen=True)
class Pending:
    """A pair to score: digest of its content, and its two uint8 images, which may differ in size."""

    pair: Pair
    content: str
    images: tuple[Tensor, Tensor]


def _pending(
    pairs: Iterator[tuple[str, Pair]],
    config: RelabelConfig,
    quarantine: Quarantine,
    store: ScoreStore,
    order: list[tuple[str, str]],
) -> Iterator[Pending]:
    """Yield the pairs without scores; append (key, content) of every pair to ``order``."""
    yielded: set[str] = set()
    for key, pair in tqdm(pairs, unit="pair", disable=None):
        in_memory = fetched(pair)
        try:
            content = content_key(in_memory)
        except SampleError:
            content = ""
        order.append((key, content))
        if content in store.known or content in yielded:
            continue
        if (images := usable_images(in_memory, config.settings(), quarantine)) is not None:
            yielded.add(content)
            first, second = (to_uint8(image) for image in images)
            yield Pending(in_memory, content, (first, second))


def _all_pairs(
    source: str | Path, config: RelabelConfig, quarantine: Quarantine, formats: Mapping[str, Format]
) -> Iterator[tuple[str, Pair]]:
    if config.streaming:
        streamed = open_stream_part(source, config.settings())
        quarantine.notes += streamed.stream.notes
        yield from ((key, pair) for key, pair, _ in streamed.pairs(quarantine))
        return
    part = open_part(source, config.settings(), formats)
    quarantine.notes += part.table.notes
    for row, index, pair, _ in part.pairs(quarantine):
        yield f"{row}.{index}", pair


def _batches(pending: Iterator[Pending], size: int) -> Iterator[list[Pending]]:
    """Group pairs of equal image sizes into batches of up to ``size``."""
    waiting: dict[tuple[torch.Size, torch.Size], list[Pending]] = {}
    for entry in pending:
        shapes = (entry.images[0].shape, entry.images[1].shape)
        waiting.setdefault(shapes, []).append(entry)
        if len(waiting[shapes]) == size:
            yield waiting.pop(shapes)
    yield from waiting.values()


def judge(rewards: Mapping[str, Reward], batch: Sequence[Pending]) -> list[Scores]:
    """Score a batch of pairs; None where a reward failed.

    Rewards that need groups get each pair as a group, if its images have equal size; otherwise they score None.
    """
    device = default_device()
    prompts = [entry.pair.prompt for entry in batch]
    sides = [torch.stack([entry.images[side] for entry in batch]).to(device).float() / 255 for side in (0, 1)]
    if sides[0].shape == sides[1].shape:
        groups = torch.arange(len(batch)).repeat(2)
        both = score(rewards, torch.cat(sides), [*prompts, *prompts], groups)
        scores: list[Mapping[str, Tensor]] = [{name: both[name].chunk(2)[side] for name in rewards} for side in (0, 1)]
    else:
        alone = {name: reward for name, reward in rewards.items() if not needs_groups(reward)}
        scores = [score(alone, images, prompts).values for images in sides]
    missing = torch.full((len(batch),), math.nan)
    return [
        {f"{name}/{side}": _number(scores[side].get(name, missing)[i]) for name in rewards for side in (0, 1)}
        for i in range(len(batch))
    ]


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def _row(key: str, content: str, scores: Scores, weights: Mapping[str, float], config: RelabelConfig) -> dict[str, Any]:
    columns = {f"{name}/{side}": scores.get(f"{name}/{side}") for name in weights for side in (0, 1)}
    gaps = []
    for name, weight in weights.items():
        first, second = columns[f"{name}/0"], columns[f"{name}/1"]
        gaps.append((weight, None if first is None or second is None else first - second))
    return {"key": key, "content": content, "label": RULES[config.rule](gaps, config.scale), **columns}


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    labels = [row["label"] for row in rows if row["label"] is not None]
    ties, first = labels.count(0.5), sum(label > 0.5 for label in labels)
    return (
        f"{len(rows)} pairs, first image preferred in {first}, second in {len(labels) - first - ties}, {ties} ties, "
        f"{len(rows) - len(labels)} without a label"
    )


def _recipes(config: RelabelConfig) -> dict[str, dict[str, Any]]:
    """Map each reward to the settings that its scores depend on."""
    entries = {name: e if isinstance(e, RewardConfig) else RewardConfig() for name, e in config.judges().items()}
    return {name: {"reward": entry.reward, "options": entry.options} for name, entry in entries.items()}


class ScoreStore:
    """Scores by content, from the finished table and from the progress file of an interrupted run."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path.with_suffix(".jsonl")
        self.known: dict[str, Scores] = {}
        names = list(about["rewards"])
        before = path.with_suffix(".json")
        if before.is_file() and json.loads(before.read_text(encoding="utf-8"))["rewards"] == about["rewards"]:
            self._load(read_table(path), names)
        drop_partial_line(self.path)
        rows = read_rows(self.path)
        if len(rows) > 1 and rows[0] != about:
            raise ValueError(
                f"{self.path} holds scores of other rewards: delete it, or choose another name with --labels"
            )
        self._load(rows[1:], names)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a" if len(rows) > 1 else "w", encoding="utf-8")
        if len(rows) <= 1:
            self._write(about)

    def _load(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        columns = [f"{name}/{side}" for name in names for side in (0, 1)]
        for row in rows:
            if all(row[column] is not None for column in columns):
                self.known[row["content"]] = {column: row[column] for column in columns}

    def add(self, content: str, scores: Scores) -> None:
        """Store the scores of a pair and append them to the progress file."""
        self.known[content] = scores
        self._write({"content": content, **scores})

    def _write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close and delete the progress file, after the table was written."""
        self.file.close()
        self.path.unlink()


def run(config: RelabelConfig) -> None:
    """Write a file of labels for each source. Raises ValueError without data."""
    if not config.data:
        raise ValueError("name preference data: diffalign relabel pairs.parquet --rewards pickscore")
    if len(config.data) > 1 and config.labels.endswith(".parquet"):
        raise ValueError(
            f"labels {config.labels} is one file for {len(config.data)} sources: give a name without .parquet"
        )
    for source in config.data:
        relabel(source, config)
