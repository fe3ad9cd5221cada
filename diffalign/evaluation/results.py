"""From scored images to figures: means, accuracy by task, win rates against the base, diversity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffalign.evaluation.diversity import embedding_distance, pairwise_distance
from diffalign.evaluation.markdown import inert
from diffalign.evaluation.win_rate import Interval, WinRate, mean_interval, win_rate


@dataclass(frozen=True)
class Figures:
    """One model.

    rewards: name -> mean over prompts, with its 95 % interval; None where no image has a score. tasks: tag -> mean of
    the first reward; empty where prompts carry no tags, or one. wins: reward -> against the base, where an image has a
    score of both; empty for the base itself.
    diversity: "pixels", and "embedding" where an embedding model was given; empty with one image per prompt.
    """

    rewards: dict[str, Interval | None]
    tasks: dict[str, Interval]
    wins: dict[str, WinRate]
    diversity: dict[str, float]


def figures(
    prompt: Tensor,
    scores: Mapping[str, Tensor],
    tags: Sequence[str],
    base: Mapping[str, Tensor] | None,
    diversity: Mapping[str, float],
) -> Figures:
    """The figures of one model.

    prompt: (N,) integers, the prompt of each image. scores: reward -> (N,). tags: the task of each image.
    base: the scores of the model that it is compared with, on the same prompts and noise; None for that model itself.
    """
    first = next(iter(scores.values()))
    tasks = {}
    for tag in dict.fromkeys(tags) if len(set(tags)) > 1 else ():
        rows = torch.tensor([own == tag for own in tags])
        if first[rows].isfinite().any():
            tasks[tag] = mean_interval(first[rows], prompt[rows])
    means = {name: mean_interval(v, prompt) if v.isfinite().any() else None for name, v in scores.items()}
    paired = [name for name, v in scores.items() if base and (v.isfinite() & base[name].isfinite()).any()]
    wins = {name: win_rate(scores[name], base[name], prompt) for name in paired}
    return Figures(means, tasks, wins, dict(diversity))


def diversity_of(images: Tensor, prompt: Tensor, embed: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Distances within a prompt, "pixels" and with ``embed`` "embedding"; empty where no prompt has two images.

    images: (N, 3, H, W), [0, 1]. prompt: (N,). embed: images -> (N, D).
    """
    if len(prompt) == len(prompt.unique()):
        return {}
    found = {"pixels": pairwise_distance(images, prompt)}
    return found if embed is None else found | {"embedding": embedding_distance(embed(images), prompt)}


def to_json(models: Mapping[str, Figures], settings: Mapping[str, object]) -> dict:
    """``results.json``: settings, and per model the fields of ``Figures``."""
    return {"settings": dict(settings), "models": {name: asdict(found) for name, found in models.items()}}


def to_markdown(models: Mapping[str, Figures]) -> str:
    """A table with a column per model: rewards and tasks with half the width of their interval, wins, diversity."""
    found = list(models.values())
    rows = [["", *map(inert, models)], ["---", *("---:" for _ in models)]]
    rows += [[inert(name), *(_plus_minus(f.rewards[name]) for f in found)] for name in found[0].rewards]
    first = next(iter(found[0].rewards))
    tags = dict.fromkeys(tag for f in found for tag in f.tasks)
    rows += [[inert(f"{first}: {tag}"), *(_plus_minus(f.tasks.get(tag)) for f in found)] for tag in tags]
    for name in found[0].rewards:
        if any(f.wins for f in found):
            rows.append([inert(f"{name}: wins over base"), *(_wins(f.wins.get(name)) for f in found)])
    rows += [[f"diversity ({kind})", *(f"{f.diversity[kind]:.4g}" for f in found)] for kind in found[0].diversity]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plus_minus(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _wins(found: WinRate | None) -> str:
    """The rate, its interval, and wins / ties / losses."""
    if found is None:
        return "–"
    rate = found.rate
    return f"{rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}] ({found.wins} / {found.ties} / {found.losses})"
