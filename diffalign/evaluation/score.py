"""``diffalign score``: rewards of pictures that are there already."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.config import option, to_dict
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.ledger import mend, same_or_new, whole_rows
from diffalign.evaluation.score_report import scores_of, write
from diffalign.evaluation.sources import Item, read, with_prompts
from diffalign.rewards.base import Reward, get_reward, names, needs_groups, registered
from diffalign.rewards.combine import calibrate, save_calibrations
from diffalign.rewards.pictures import Picture, as_image
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.settings import RewardConfig, build_rewards
from diffalign.rewards.wire import token_from
from diffalign.rollout.scoring import score
from diffalign.structures import Prompt


@dataclass(kw_only=True)
class ScoreConfig:
    """Fields of ``diffalign score``."""

    numbers_checked: ClassVar[bool] = True

    images: tuple[str, ...] = option((), "picture files, folders, .parquet or .jsonl files")
    prompt: str | None = option(None, "one prompt for all pictures; '' for rewards that read none")
    prompts: Path | None = option(None, ".txt or .jsonl, a prompt per picture in their order")
    rewards: str | tuple[str, ...] = option((), "a reward, or several in a list or with commas between")
    reward_options: dict[str, float | RewardConfig] = option(
        {}, "how to make those that need options: '{pickscore: {options: {path: my/weights, precision: bf16}}}'"
    )
    allow_reward_code: bool = option(False, "run the code of rewards that are named file.py:function")
    output_dir: Path = option(Path("runs/score"), "where scores go; an interrupted one goes on")
    batch_size: int = option(16, "pictures of one size that are scored at once")
    calibrations: Path | None = option(
        None, "where to write what these pictures score, e.g. the base model's, for a reward that combines others"
    )
    list: bool = option(False, "print the rewards that can be named, and do nothing else")
    serve: int | None = option(None, "offer the rewards over HTTP at this port, instead of scoring")
    host: str = option("127.0.0.1", "where to offer them; 0.0.0.0: to other machines too")
    token_env: str | None = option(None, "environment variable with the token that clients must send; none: anybody")

    def __post_init__(self) -> None:
        """One text names all rewards. ValueError: numbers out of range, a place that cannot be written to."""
        if isinstance(self.rewards, str):
            self.rewards = tuple(name.strip() for name in self.rewards.split(","))
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; write 1 or more")
        if self.serve is not None and not 0 <= self.serve < 1 << 16:
            raise ValueError(f"serve: there is no port {self.serve}; write 1 to 65535, or 0 for a free one")
        if self.calibrations and not self.calibrations.parent.is_dir():
            raise ValueError(f"calibrations: there is no folder {self.calibrations.parent}; make it first")

    def build_rewards(self) -> dict[str, Reward]:
        """Those of ``rewards``. ValueError: none, or one that judges within a group."""
        table = {name: self.reward_options.get(name, 1.0) for name in self.rewards}
        rewards = build_rewards(table, self.allow_reward_code)[0]
        if not rewards:
            raise ValueError("rewards is missing: write --rewards pickscore, or --rewards pickscore,hpsv2.1")
        _check_pointwise(rewards)
        return rewards

    def items(self) -> Iterator[Item]:
        """The pictures and their prompts. ValueError: nothing to score, or a prompt is missing."""
        if not self.images:
            raise ValueError("name pictures: diffalign score FOLDER --rewards pickscore --prompt 'a red circle'")
        items = chain.from_iterable(map(read, self.images))
        if self.prompt is not None:
            return with_prompts(items, [Prompt(self.prompt)])
        return with_prompts(items, load_prompts(self.prompts)) if self.prompts else items


def _check_pointwise(rewards: Mapping[str, Reward]) -> None:
    if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
        raise ValueError(f"{', '.join(ranks)} rank images within a group of one prompt: score with others")


def score_images(
    images: Sequence[Picture] | Picture,
    prompts: Sequence[str] | str,
    rewards: Mapping[str, str | Reward] | Sequence[str | Reward] | str | Reward,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Scores of pictures of any kind and size: reward name -> (B,), float32, NaN where one has no score.

    images: PIL images, paths, arrays, tensors; see ``as_image``. prompts: one each, or one for all. rewards: names or
    rewards; a mapping gives names of your own. The numbers that a reward adds come as "reward/extra". Computed on the
    GPU where there is one.

    ValueError: prompts or metadata of another number than images, rewards that share a name or rank within a group.
    """
    several = list(images) if isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4 else [images]
    texts = [prompts] * len(several) if isinstance(prompts, str) else list(prompts)
    data = [{}] * len(several) if metadata is None else list(metadata)
    if not len(several) == len(texts) == len(data):
        raise ValueError(
            f"{len(several)} images, {len(texts)} prompts, {len(data)} entries of metadata: pass one each per image"
        )
    named = _named(rewards)
    _check_pointwise(named)
    items = [
        Item(str(i), lambda image=image: as_image(image), Prompt(text, more))
        for i, (image, text, more) in enumerate(zip(several, texts, data, strict=True))
    ]
    result = {name: torch.full((len(several),), math.nan) for name in named}
    for batch, loaded in batches(iter(items), batch_size, skip_broken=False):
        for name, values in _score(named, batch, loaded).items():
            column = result.setdefault(name, torch.full((len(several),), math.nan))
            for item, value in zip(batch, values, strict=True):
                column[int(item.name)] = value
    return result


def _named(rewards: Mapping[str, str | Reward] | Sequence[str | Reward] | str | Reward) -> dict[str, Reward]:
    if isinstance(rewards, Mapping):
        return {name: get_reward(reward) for name, reward in rewards.items()}
    found = [get_reward(reward) for reward in (rewards if isinstance(rewards, (list, tuple)) else [rewards])]
    named = {reward.name: reward for reward in found}
    if len(named) < len(found):
        raise ValueError(f"rewards share a name: {[reward.name for reward in found]}; pass a mapping with names")
    return named


def batches(
    items: Iterator[Item], size: int, skip_broken: bool = True
) -> Iterator[tuple[list[Item], list[Tensor] | Exception]]:
    """Items with their images, up to ``size`` of one resolution at once, as soon as there are so many.

    A picture that cannot be read comes alone, with the reason.
    """
    waiting: dict[tuple[int, ...], tuple[list[Item], list[Tensor]]] = {}
    for item in items:
        try:
            image = item.load()
        except (ValueError, OSError) as error:
            if not skip_broken:
                raise
            yield [item], error
            continue
        own, loaded = waiting.setdefault(tuple(image.shape), ([], []))
        own.append(item)
        loaded.append(image)
        if len(own) == size:
            yield waiting.pop(tuple(image.shape))
    yield from waiting.values()


def _score(rewards: Mapping[str, Reward], batch: Sequence[Item], images: Sequence[Tensor]) -> dict[str, list[float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = score(rewards, torch.stack(list(images)).to(device), [item.prompt for item in batch])
    return {name: found[name].tolist() for name in found}


def score_files(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores what ``config`` names, into ``scores.jsonl``, ``scores.csv`` and ``summary.json`` of its ``output_dir``.

    Rows: "image", "prompt", "rewards", or "error" for a picture that cannot be read. Pictures that have every score
    already are not scored again. ValueError: a picture without a prompt, an ``output_dir`` that cannot be written to,
    or, when all is written, a reward that scored none of the pictures.
    """
    rewards = config.build_rewards()
    items = list(config.items())
    if lacking := [item.name for item in items if item.prompt is None]:
        raise ValueError(
            f"{len(lacking)} of {len(items)} pictures have no prompt ({lacking[0]} ...): write --prompt TEXT (or "
            "--prompt '' for rewards that read none), --prompts FILE, or NAME.txt beside each picture"
        )
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be made ({error.strerror}); choose another") from error
    same_or_new(folder / "settings.json", {"rewards": list(rewards), "options": to_dict(config)["reward_options"]})
    mend(folder / "scores.jsonl")
    done = {_key(row): row for row in whole_rows(folder / "scores.jsonl") if _is_scored(row, rewards)}
    left = [item for item in items if (item.name, item.prompt.text) not in done]
    with (folder / "scores.jsonl").open("a", encoding="utf-8") as file, tqdm(total=len(items), unit="img") as bar:
        bar.update(len(items) - len(left))
        for batch, loaded in batches(iter(left), config.batch_size):
            for row in _rows(rewards, batch, loaded):
                done[_key(row)] = row
                file.write(json.dumps(row) + "\n")
                if "error" in row:
                    tqdm.write(f"{row['image']}: {row['error']}")
            file.flush()
            bar.update(len(batch))
    rows = [done[item.name, item.prompt.text] for item in items]
    write(folder, rows, rewards)
    if nothing := [name for name in rewards if not len(scores_of(rows, name))]:
        raise ValueError(f"{', '.join(nothing)} scored none of {len(rows)} pictures; the warnings above say why")
    if config.calibrations:
        save_calibrations(config.calibrations, {name: calibrate(scores_of(rows, name)) for name in rewards})
    return rows


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["image"], row["prompt"]


def _is_scored(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(row.get("rewards", {}).get(name) is not None for name in names)


def _rows(
    rewards: Mapping[str, Reward], batch: Sequence[Item], loaded: Sequence[Tensor] | Exception
) -> Iterator[dict[str, Any]]:
    if isinstance(loaded, Exception):
        yield {"image": batch[0].name, "prompt": batch[0].prompt.text, "error": str(loaded)}
        return
    found = _score(rewards, batch, loaded)
    for i, item in enumerate(batch):
        values = {name: None if math.isnan(found[name][i]) else found[name][i] for name in found}
        yield {"image": item.name, "prompt": item.prompt.text, "rewards": values}


def serve(config: ScoreConfig) -> None:
    """Offers the rewards of ``config`` until it is interrupted."""
    token = token_from(config.token_env, "the server")
    rewards = config.build_rewards()
    try:
        server = RewardServer(rewards, config.host, config.serve, config.batch_size, token)
    except OSError as error:
        raise ValueError(f"cannot serve at {config.host}:{config.serve} ({error}); choose another port") from error
    with server:
        print(f"rewards {', '.join(server.rewards)} at http://{config.host}:{server.server_port}", flush=True)
        server.serve_forever()


def run(config: ScoreConfig) -> None:
    """The command: scores, serves or lists."""
    if config.list:
        print(reward_table())
    elif config.serve is None:
        score_files(config)
    else:
        serve(config)


def reward_table() -> str:
    """The rewards that can be named, as Markdown: what the README shows, and plug-ins."""
    lines = ["| name | measures | range | gradient | weights | M parameters | licence | source |"]
    lines.append("| --- | --- | --- | --- | --- | ---: | --- | --- |")
    for name in names():
        facts = registered(name).facts
        try:
            reward = registered(name).make()
            low, high = reward.range
            bounds = ("(−∞, " if math.isinf(low) else f"[{low:g}, ") + ("∞)" if math.isinf(high) else f"{high:g}]")
            gradient = "yes" if reward.differentiable else "no"
        except ValueError:  # what it needs is not said here, e.g. a server
            bounds, gradient = "its own", "–"
        size = f"{facts.millions:,.0f}" if facts.millions else "–"
        cells = (f"`{name}`", facts.measures, bounds, gradient, facts.weights or "–", size, facts.licence or "–")
        lines.append(f"| {' | '.join((*cells, facts.source or '–'))} |")
    return "\n".join(lines)
