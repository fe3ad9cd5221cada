"""Summarize scored images: means, per-task means, win rates against the base, diversity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from diffalign.evaluation.diversity import embedding_distance, pairwise_distance
from diffalign.evaluation.win_rate import Interval, WinRate, mean_interval, win_rate
from diffalign.report.markdown import inert


@dataclass(frozen=True)
class ModelResults:
    """Results of one model.

    Attributes:
        rewards: Reward -> mean over images with a 95 % interval over prompts; None if no image has a score.
        tasks: Tag -> mean of ``primary``; empty if prompts have fewer than two tags.
        wins: Reward -> win rate against the base; without rewards that share no scored image. Empty for the base.
        diversity: "pixels", and "embedding" with an embedding model; empty with one image per prompt.
        primary: Name of the first reward.
        images: Number of images.
        scored: Reward -> number of images with a score.
    """

    rewards: dict[str, Interval | None]
    tasks: dict[str, Interval]
    wins: dict[str, WinRate]
    diversity: dict[str, float]
    primary: str = ""
    images: int = 0
    scored: dict[str, int] = field(default_factory=dict)


def figures(
    prompt: Tensor,
    scores: Mapping[str, Tensor],
    tags: Sequence[str],
    base: Mapping[str, Tensor] | None,
    diversity: Mapping[str, float],
) -> ModelResults:
    """Summarize the scores of one model.

    Args:
        prompt: (N,) integers, the prompt of each image.
        scores: Reward -> (N,); the first one is reported per task.
        tags: Task of each image.
        base: Scores of the base model for the same prompts and noise, rewards in any order; None for the base.
        diversity: Result of ``diversity_of``.
    """
    primary, first = next(iter(scores.items()))
    tasks = {}
    for tag in dict.fromkeys(tags) if len(set(tags)) > 1 else ():
        rows = torch.tensor([own == tag for own in tags])
        if first[rows].isfinite().any():
            tasks[tag] = mean_interval(first[rows], prompt[rows])
    means = {name: mean_interval(v, prompt) if v.isfinite().any() else None for name, v in scores.items()}
    wins = {}
    if base:
        paired = [name for name, v in scores.items() if (v.isfinite() & base[name].isfinite()).any()]
        wins = {name: win_rate(scores[name], base[name], prompt) for name in paired}
    scored = {name: int(v.isfinite().sum()) for name, v in scores.items()}
    return ModelResults(means, tasks, wins, dict(diversity), primary, len(prompt), scored)


def diversity_of(images: Tensor, prompt: Tensor, embed: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Compute distances within a prompt: "pixels", and "embedding" with ``embed``; empty if no prompt has two images.

    Args:
        images: (N, 3, H, W), in [0, 1].
        prompt: (N,) integers.
        embed: Maps images to (N, D) embeddings.
    """
    if len(prompt) == len(prompt.unique()):
        return {}
    found = {"pixels": pairwise_distance(images, prompt)}
    return found if embed is None else found | {"embedding": embedding_distance(embed(images), prompt)}


def to_json(models: Mapping[str, ModelResults], settings: Mapping[str, object]) -> dict:
    """Return the content of ``results.json``: settings, and the fields of ``ModelResults`` per model."""
    return {"settings": dict(settings), "models": {name: asdict(found) for name, found in models.items()}}


def to_markdown(models: Mapping[str, ModelResults]) -> str:
    """Format a table with a column per model; means are given with half the width of their interval.

    Raises ValueError if models have different primary rewards.
    """
    found = list(models.values())
    if len({f.primary for f in found}) > 1:
        raise ValueError(
            f"models have different primary rewards ({', '.join(f.primary for f in found)}): give rewards in one order"
        )
    rows = [["", *map(inert, models)], ["---", *("---:" for _ in models)]]
    rows += [
        [inert(name), *(_plus_minus(f.rewards[name]) + _share(f, name) for f in found)] for name in found[0].rewards
    ]
    first = found[0].primary
    tags = dict.fromkeys(tag for f in found for tag in f.tasks)
    rows += [[inert(f"{first}: {tag}"), *(_plus_minus(f.tasks.get(tag)) for f in found)] for tag in tags]
    for name in found[0].rewards:
        if any(f.wins for f in found):
            rows.append([inert(f"{name}: wins over base"), *(_wins(f.wins.get(name)) for f in found)])
    rows += [[f"diversity ({kind})", *(f"{f.diversity[kind]:.4g}" for f in found)] for kind in found[0].diversity]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def set_line(found: ModelResults, prompts: int, source: object = "") -> str:
    """Describe what the means of a table are over."""
    of = f" of `{source}`" if source else ""
    each = found.images / prompts
    per = f", {each:g} images each" if each != 1 else ""
    return (
        f"Means over all {found.images} images ({prompts} prompts{of}{per}), ± half of a 95 % interval over prompts; "
        "win rates are averaged over prompts, a tie counts half."
    )


def _share(found: ModelResults, name: str) -> str:
    """Format the number of scored images; empty if all or none have a score."""
    scored = found.scored.get(name, found.images)
    return f" ({scored} of {found.images} scored)" if 0 < scored < found.images else ""


def _plus_minus(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _wins(found: WinRate | None) -> str:
    """Format rate, interval, and wins / ties / losses."""
    if found is None:
        return "–"
    rate = found.rate
    return f"{rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}] ({found.wins} / {found.ties} / {found.losses})"
