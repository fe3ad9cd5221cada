"""Evaluates a model on held-out prompts: ODE sampling at fixed seeds, scored, with diversity beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.evaluation.accuracy import summarise
from diffalign.evaluation.diversity import pairwise_distance
from diffalign.models import DiffusionModel
from diffalign.rewards.base import Reward
from diffalign.rollout.collect import Addresses, generate
from diffalign.rollout.encoding import EncodedPrompts
from diffalign.rollout.sampler import Route, ode_plan
from diffalign.rollout.scoring import score
from diffalign.runtime.noise import Noise
from diffalign.structures import Guidance, Level, Prompt

# Fixed, so that runs with different seeds are judged on the same noise.
EVALUATION_SEED = 0
SHOWN = 12


@dataclass(frozen=True)
class Shown:
    """What a grid needs: prompts, one image each (P, 3, H, W), and its first reward (P,)."""

    prompts: list[str]
    images: Tensor
    scores: Tensor


class Evaluation:
    """Held-out prompts, how to sample them and how to judge the images. Prompts are dealt over all processes."""

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        encoded: EncodedPrompts,
        accelerator: Accelerator,
        *,
        images_per_prompt: int,
        batch_size: int,
    ) -> None:
        self.model, self.rewards, self.encoded = model, rewards, encoded
        self.index = list(range(len(prompts)))[accelerator.process_index :: accelerator.num_processes]
        self.prompts = [prompts[i] for i in self.index]
        self.per_prompt, self.batch_size = images_per_prompt, batch_size

    def run(self, levels: Level, guidance: Guidance) -> tuple[dict[str, float], Shown]:
        """Figures of the weights in use, over all processes, and this process's pictures.

        ``accuracy`` is the mean of the first reward, also by task where prompts carry a "tag"; then the mean of each
        reward, and ``diversity``, the pairwise distance within a prompt.
        """
        prompts = [p for p in self.prompts for _ in range(self.per_prompt)]
        place = torch.arange(len(prompts))
        own, sample = place // self.per_prompt, place % self.per_prompt
        images = self._images(levels, guidance, own, sample)
        scores = score(self.rewards, images, prompts)
        first = next(iter(scores))
        tags = [str(p.metadata.get("tag", "all")) for p in prompts]
        rows = [(tag, {name: scores[name][i].item() for name in scores}) for i, tag in enumerate(tags)]
        spread = [(len(self.prompts), pairwise_distance(images, own))] if self.per_prompt > 1 else []
        figures = summary(gather_object(rows), first, gather_object(spread))
        chosen = torch.linspace(0, len(self.prompts) - 1, min(SHOWN, len(self.prompts))).long() * self.per_prompt
        return figures, Shown([prompts[i].text for i in chosen.tolist()], images[chosen], scores[first][chosen])

    def _images(self, levels: Level, guidance: Guidance, own: Tensor, sample: Tensor) -> Tensor:
        route = Route(ode_plan(len(levels) - 1), levels, guidance)
        conditioning = self.encoded([p.text for p in self.prompts])
        # Noise is addressed by the prompt's place in the file: the same images on any number of processes.
        addresses = Addresses(Noise(EVALUATION_SEED), "evaluation", 0, torch.tensor(self.index)[own], sample)
        parts = generate(self.model, route, conditioning, own, addresses, self.batch_size)
        return torch.cat([images.cpu() for _, images in parts])


def summary(rows: list[tuple[str, dict[str, float]]], first: str, spread: list[tuple[int, float]]) -> dict[str, float]:
    """Figures from the rows (tag, scores) and the (prompts, diversity) of all processes."""
    tags = [tag for tag, _ in rows]
    result = summarise([values[first] for _, values in rows], tags)
    if len(set(tags)) == 1:
        result = {"accuracy": result["accuracy"]}
    for name in rows[0][1]:
        values = torch.tensor([values[name] for _, values in rows])
        result[name] = values.nanmean().item()
    if spread:
        result["diversity"] = sum(n * value for n, value in spread) / sum(n for n, _ in spread)
    return result
