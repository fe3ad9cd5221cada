"""``diffalign rank``: sample n images of each prompt, and keep the best by a reward: files, a grid, training data.

<output_dir>/<model>/best/00012-1.png     the best image of prompt 12; -2 the second
             <model>.png                  a row per prompt, images by rank, scores below
             <model>-ranking.jsonl        prompt, image, rank and scores of every image
             <model>-sft.jsonl            the best image of each prompt, liked: for ``--loss sft``
             <model>-pairs.jsonl          the best and the worst: for ``train diffusion_dpo``
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.atomic import replacing, write_text
from diffalign.commands.evaluate import GRID_ROWS, draw_all
from diffalign.commands.evaluate_config import resolve
from diffalign.commands.rank_config import RankConfig
from diffalign.evaluation.checkpoints import CheckpointSpec
from diffalign.evaluation.sampling import spread_evenly
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.models.load import edits
from diffalign.preflight import inspect
from diffalign.report.grids import compare_grid
from diffalign.rewards.support.sources import source_images
from diffalign.structures import Prompt

IMAGES = 9  # per prompt, as GenAI-Rank
COLUMNS = 9  # of the grid, which shows the best ones and the worst


@dataclass(frozen=True)
class Ranked:
    """The images of a prompt.

    Attributes:
        prompt: The prompt.
        index: Its index.
        rows: Indices of its images in the model's, best first; those without a score are left out.
        scores: Their scores.
    """

    prompt: Prompt
    index: int
    rows: list[int]
    scores: list[float]

    @property
    def told_apart(self) -> bool:
        """Whether the best image has a higher score than the worst."""
        return len(self.rows) > 1 and self.scores[0] > self.scores[-1]


def run(config: RankConfig) -> dict[str, list[Ranked]] | None:
    """Rank the images of every model; None on all but the main process."""
    resolved = resolve(config, Path("runs/rank"), images_per_prompt=IMAGES)
    inspect(resolved, weights=True)
    drawn = draw_all(resolved)
    if drawn is None:
        return None
    prompts, scored = drawn
    found = {name: ranked(prompts, own, resolved.rewards[0]) for name, own in scored.items()}
    shows_sources = edits(resolved.model, resolved.revision)
    for name, order in found.items():
        own, reward = scored[name], resolved.rewards[0]
        print(_write(resolved.output_dir, name, order, own, config.best, reward, shows_sources))
    return found


def ranked(prompts: Sequence[Prompt], own: ScoredImages, reward: str) -> list[Ranked]:
    """Sort the images of each prompt by a reward; equal ones keep the order of their samples."""
    values: Tensor = own.scores[reward]
    found = []
    for index, prompt in enumerate(prompts):
        rows = [row for row in (own.prompt == index).nonzero()[:, 0].tolist() if not values[row].isnan()]
        rows.sort(key=lambda row: -values[row].item())
        found.append(Ranked(prompt, index, rows, [values[row].item() for row in rows]))
    return found


def _write(
    folder: Path, name: str, order: Sequence[Ranked], own: ScoredImages, best: int, reward: str, shows_sources: bool
) -> str:
    """Write files, grid and tables of one model; return a line about them."""
    stem = CheckpointSpec(name).folder_name
    kept = folder / stem / "best"
    kept.mkdir(parents=True, exist_ok=True)
    for one in order:
        for place, row in enumerate(one.rows[:best], start=1):
            with replacing(kept / f"{one.index:05d}-{place}.png") as staged:
                shutil.copyfile(own.files[row], staged)

    def record(one: Ranked, **more: Any) -> str:
        return json.dumps({"prompt": one.prompt.text, **more, "metadata": dict(one.prompt.metadata)}) + "\n"

    def path(row: int) -> str:
        return own.files[row].relative_to(folder).as_posix()  # a table may name files below its own folder only

    def scores(row: int) -> dict[str, float | None]:
        values = {key: value[row].item() for key, value in own.scores.items()}
        return {key: None if math.isnan(value) else value for key, value in values.items()}

    every = [
        record(one, image=path(row), rank=place, scores=scores(row))
        for one in order
        for place, row in enumerate(one.rows, start=1)
    ]
    tables = {
        "ranking": every,
        "sft": [record(one, image=path(one.rows[0]), liked=1) for one in order if one.rows],
        "pairs": [
            record(one, chosen=path(one.rows[0]), rejected=path(one.rows[-1])) for one in order if one.told_apart
        ],
    }
    for kind, lines in tables.items():
        write_text(folder / f"{stem}-{kind}.jsonl", "".join(lines))
    _grid(folder / f"{stem}.png", order, own, reward, shows_sources)
    count = len(tables["pairs"])
    means = [(one.scores[0], sum(one.scores) / len(one.scores)) for one in order if one.rows]
    if not means:
        return f"{name}: no image has a score by {reward}; see the warnings above"
    top, mean = (sum(values) / len(means) for values in zip(*means, strict=True))
    return f"{name}: best by {reward} {top:.4g}, mean {mean:.4g}; {count} pairs in {folder / f'{stem}-pairs.jsonl'}"


def _grid(path: Path, order: Sequence[Ranked], own: ScoredImages, reward: str, shows_sources: bool = False) -> None:
    """Draw a row per prompt, best image first; of more than ``COLUMNS`` images, evenly spread ranks.

    Where fewer images of a prompt have a score, the last places are blank.
    """
    most = max((len(one.rows) for one in order), default=0)
    if not most:
        return
    places = spread_evenly(most, COLUMNS)
    shown = [order[i] for i in spread_evenly(len(order), GRID_ROWS)]
    blank = torch.ones_like(own.images([next(one.rows[0] for one in order if one.rows)])[0])
    columns, scores = {}, {}
    for place in places:
        name = _place_name(place, most)
        there = [place < len(one.rows) for one in shown]
        columns[name] = torch.stack(
            [own.images([one.rows[place]])[0] if has else blank for one, has in zip(shown, there, strict=True)]
        )
        values = [one.scores[place] if has else math.nan for one, has in zip(shown, there, strict=True)]
        scores[name] = {reward: torch.tensor(values)}
    metadata = [one.prompt.metadata for one in shown]
    sources = source_images(metadata, (blank.shape[-2], blank.shape[-1])) if shows_sources else None
    compare_grid(columns, [one.prompt.text for one in shown], scores, path, sources=sources)


def _place_name(place: int, count: int) -> str:
    if place == 0:
        return "best"
    return f"worst of {count}" if place == count - 1 else str(place + 1)
