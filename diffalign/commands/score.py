"""``diffalign score``: score existing images with rewards, or serve rewards over HTTP."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.commands.image_sources import Item
from diffalign.commands.resume import drop_partial_line, read_rows, write_or_check_settings
from diffalign.commands.score_config import ScoreConfig, check_pointwise
from diffalign.config import to_dict
from diffalign.device import default_device
from diffalign.report.score_report import scores_of, write
from diffalign.rewards.base import Reward, get_reward, names, registered
from diffalign.rewards.combine import calibrate, save_calibrations
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.support.images import Picture, as_image, separate
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
    """Score images of any type and size, on the GPU if there is one.

    Args:
        images: PIL images, paths, arrays or tensors; see ``as_image``.
        prompts: One per image, or one for all.
        rewards: Names or reward objects; a mapping assigns names.
        metadata: One mapping per image.
        batch_size: Images of one size that are scored together.

    Returns:
        Reward name -> (B,) float32, NaN where the reward failed; extra values of a reward as "reward/extra".

    Raises:
        ValueError: Numbers of prompts or metadata differ from images, or rewards share a name or need groups.
    """
    several = separate(images)
    texts = [prompts] * len(several) if isinstance(prompts, str) else list(prompts)
    data = [{}] * len(several) if metadata is None else list(metadata)
    if not len(several) == len(texts) == len(data):
        raise ValueError(
            f"{len(several)} images, {len(texts)} prompts, {len(data)} entries of metadata: pass one each per image"
        )
    named = _named(rewards)
    check_pointwise(named)
    items = [
        Item(str(i), partial(as_image, image), Prompt(text, more))
        for i, (image, text, more) in enumerate(zip(several, texts, data, strict=True))
    ]
    result = {name: torch.full((len(several),), math.nan) for name in named}

    for batch, loaded in batches(iter(items), batch_size):
        if isinstance(loaded, Exception):
            raise loaded
        for name, values in _score(named, batch, loaded).items():
            column = result.setdefault(name, torch.full((len(several),), math.nan))
            for item, value in zip(batch, values, strict=True):
                column[int(item.name)] = value
    return result


def _named(rewards: Mapping[str, str | Reward] | Sequence[str | Reward] | str | Reward) -> dict[str, Reward]:
    if isinstance(rewards, Mapping):
        return {name: get_reward(reward) for name, reward in rewards.items()}
    if isinstance(rewards, str) or not isinstance(rewards, Sequence):
        rewards = [rewards]
    found = [get_reward(reward) for reward in rewards]
    named = {reward.name: reward for reward in found}
    if len(named) < len(found):
        raise ValueError(f"rewards share a name: {[reward.name for reward in found]}; pass a mapping with names")
    return named


def batches(items: Iterator[Item], size: int) -> Iterator[tuple[list[Item], list[Tensor] | Exception]]:
    """Group items with their loaded images into batches of up to ``size`` images of one resolution.

    An unreadable image is yielded alone with its error.
    """
    waiting: dict[tuple[int, ...], tuple[list[Item], list[Tensor]]] = {}
    for item in items:
        try:
            image = item.load()
        except (ValueError, OSError) as error:
            yield [item], error
            continue
        own, loaded = waiting.setdefault(tuple(image.shape), ([], []))
        own.append(item)
        loaded.append(image)
        if len(own) == size:
            yield waiting.pop(tuple(image.shape))
    yield from waiting.values()


def _score(rewards: Mapping[str, Reward], batch: Sequence[Item], images: Sequence[Tensor]) -> dict[str, list[float]]:
    device = default_device()
    scores = score(rewards, torch.stack(list(images)).to(device), [item.asked for item in batch])
    return {name: scores[name].tolist() for name in scores}


def score_files(config: ScoreConfig) -> list[dict[str, Any]]:
    """Score the images of ``config``; write ``scores.jsonl``, ``scores.csv`` and ``summary.json`` to ``output_dir``.

    Images that already have all scores for the same content, prompt and metadata are skipped.

    Returns:
        A row per image with "image", "prompt", a digest of "metadata" if any, and "rewards"; "error" if unreadable.

    Raises:
        ValueError: An image has no prompt, ``output_dir`` cannot be created, or (after writing) a reward failed on
            all images.
    """
    rewards = config.build_rewards()
    items = list(config.items())
    if lacking := [item.name for item in items if item.prompt is None]:
        raise ValueError(
            f"{len(lacking)} of {len(items)} images have no prompt ({lacking[0]} ...): write --prompt TEXT (or "
            "--prompt '' for rewards that ignore it), --prompts FILE, or NAME.txt beside each image"
        )
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be created ({error.strerror}); choose another") from error
    write_or_check_settings(
        folder / "settings.json", {"rewards": list(rewards), "options": to_dict(config)["reward_options"]}
    )
    drop_partial_line(folder / "scores.jsonl")
    done = {_key(row): row for row in read_rows(folder / "scores.jsonl") if _is_scored(row, rewards)}
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
    write(folder, rows, list(rewards))
    if failed := [name for name in rewards if not len(scores_of(rows, name))]:
        raise ValueError(f"{', '.join(failed)} failed on all {len(rows)} images: see the warnings above")
    if config.calibrations:
        save_calibrations(config.calibrations, {name: calibrate(scores_of(rows, name)) for name in rewards})
    return rows


def _about(item: Item) -> dict[str, str]:
    """Return the identifying fields of a row: image name, prompt, content, and a digest of metadata if any."""
    about = {"image": item.name, "prompt": item.asked.text}
    about |= {"content": item.content} if item.content else {}
    if not item.asked.metadata:
        return about
    metadata = json.dumps(item.asked.metadata, sort_keys=True, default=str)
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
    scores = _score(rewards, batch, loaded)
    for i, item in enumerate(batch):
        values = {name: None if math.isnan(scores[name][i]) else scores[name][i] for name in scores}
        yield {**_about(item), "rewards": values}


def serve(config: ScoreConfig, port: int) -> None:
    """Serve the rewards of ``config`` at a port until SIGINT or SIGTERM; open requests are answered first."""
    token = token_from(config.token_env, "the server")
    rewards = config.build_rewards()
    try_rewards(rewards, ())  # load weights before the first request
    try:
        server = RewardServer(rewards, config.host, port, config.batch_size, token, config.time_limit)
    except OSError as error:
        raise ValueError(f"cannot serve at {config.host}:{port} ({error}); choose another port") from error
    with server:
        print(f"rewards {', '.join(server.rewards)} at http://{config.host}:{server.server_port}", flush=True)
        server.serve_forever()


def run(config: ScoreConfig) -> None:
    """Score images, serve rewards, or list them."""
    if config.list:
        print(reward_table())
    elif config.serve is None:
        score_files(config)
    else:
        serve(config, config.serve)


def reward_table() -> str:
    """Format all registered rewards, plug-ins included, as a Markdown table."""
    lines = ["| name | measures | range | gradient | weights | M parameters | licence | source |"]
    lines.append("| --- | --- | --- | --- | --- | ---: | --- | --- |")
    for name in names():
        card = registered(name).facts
        try:
            reward = registered(name).make()
            low, high = reward.range
            bounds = ("(−∞, " if math.isinf(low) else f"[{low:g}, ") + ("∞)" if math.isinf(high) else f"{high:g}]")
            gradient = "yes" if reward.differentiable else "no"
        except ValueError:  # needs options, e.g. a server
            bounds, gradient = "its own", "–"
        size = f"{card.millions:,.0f}" if card.millions else "–"
        weights = f"{card.weights or '–'}{' (on a server)' if card.served else ''}"
        cells = (f"`{name}`", card.measures, bounds, gradient, weights, size, card.licence or "–")
        lines.append(f"| {' | '.join((*cells, card.source or '–'))} |")
    return "\n".join(lines)
