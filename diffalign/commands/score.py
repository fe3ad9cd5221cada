"""``diffalign score``: rewards of pictures that are there already."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.commands.image_sources import Item
from diffalign.commands.resume import drop_partial_line, same_or_new, whole_rows
from diffalign.commands.score_config import ScoreConfig, check_pointwise
from diffalign.config import to_dict
from diffalign.report.score_report import scores_of, write
from diffalign.rewards.base import Reward, get_reward, names, registered
from diffalign.rewards.combine import calibrate, save_calibrations
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.support.images import Picture, as_image
from diffalign.rewards.support.probe import try_rewards
from diffalign.rollout.scoring import score
from diffalign.structures import Prompt
from diffalign.tokens import token_from


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
    check_pointwise(named)
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

    Rows: "image", "prompt", a digest of "metadata" where there are any, "rewards", or "error" for a picture that cannot
    be read. Pictures that have every score already, for the same prompt and metadata, are not scored again.

    ValueError: a picture without a prompt, an ``output_dir`` that cannot be written to, or, when all is written, a
    reward that scored none of the pictures.
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
    drop_partial_line(folder / "scores.jsonl")
    done = {_key(row): row for row in whole_rows(folder / "scores.jsonl") if _is_scored(row, rewards)}
    left = [item for item in items if _key(_about(item)) not in done]
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
    rows = [done[_key(_about(item))] for item in items]
    write(folder, rows, rewards)
    if nothing := [name for name in rewards if not len(scores_of(rows, name))]:
        raise ValueError(f"{', '.join(nothing)} scored none of {len(rows)} pictures; the warnings above say why")
    if config.calibrations:
        save_calibrations(config.calibrations, {name: calibrate(scores_of(rows, name)) for name in rewards})
    return rows


def _about(item: Item) -> dict[str, str]:
    """Describe a picture in its row: its name, prompt and content, and a digest of its metadata, if there are any."""
    about = {"image": item.name, "prompt": item.prompt.text}
    about |= {"content": item.content} if item.content else {}
    if not item.prompt.metadata:
        return about
    metadata = json.dumps(item.prompt.metadata, sort_keys=True, default=str)
    return {**about, "metadata": hashlib.blake2b(metadata.encode(), digest_size=16).hexdigest()}


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["image"], row["prompt"], row.get("content", ""), row.get("metadata", "")


def _is_scored(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(row.get("rewards", {}).get(name) is not None for name in names)


def _rows(
    rewards: Mapping[str, Reward], batch: Sequence[Item], loaded: Sequence[Tensor] | Exception
) -> Iterator[dict[str, Any]]:
    if isinstance(loaded, Exception):
        yield {**_about(batch[0]), "error": str(loaded)}
        return
    found = _score(rewards, batch, loaded)
    for i, item in enumerate(batch):
        values = {name: None if math.isnan(found[name][i]) else found[name][i] for name in found}
        yield {**_about(item), "rewards": values}


def serve(config: ScoreConfig) -> None:
    """Offer the rewards of ``config`` until SIGINT or SIGTERM; requests under way are answered first."""
    token = token_from(config.token_env, "the server")
    rewards = config.build_rewards()
    try_rewards(rewards, ())  # weights load before a client waits for them
    try:
        server = RewardServer(rewards, config.host, config.serve, config.batch_size, token, config.time_limit)
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
