"""Evaluates a model on held-out prompts: ODE sampling at fixed seeds, scored, with diversity beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

from diffalign.evaluation.accuracy import summarise
from diffalign.evaluation.diversity import pairwise_distance
from diffalign.evaluation.sampling import spread_evenly
from diffalign.models import DiffusionModel
from diffalign.models.offload import VAE
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rewards.base import Reward
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.rollout.scoring import score
from diffalign.structures import Guidance, Level, Prompt

# Fixed, so that runs with different seeds are judged on the same noise.
EVALUATION_SEED = 0
SHOWN = 12


@dataclass(frozen=True)
class Shown:
    """What pictures and tables need.

    texts, images, marks: P prompts of this process, one image each (P, 3, H, W), and its scores, reward -> (P,), the
    primary reward first. prompt, tags, scores: of every image of all processes, in the order of prompts and samples.
    diversity: pairwise distance within a prompt, in pixel values; None with one image per prompt. about: what the
    evaluation was of; two are comparable where it is the same.
    """

    texts: list[str]
    images: Tensor
    marks: dict[str, Tensor]
    prompt: Tensor
    tags: list[str]
    scores: dict[str, Tensor]
    diversity: float | None
    about: str = ""


class Evaluation:
    """Held-out prompts, how to sample them and how to judge the images. Prompts are dealt over all processes."""

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        encoded: PromptEmbeddingCache,
        accelerator: Accelerator,
        *,
        images_per_prompt: int,
        batch_size: int,
        pulse: Callable[[], None],
        even: bool = False,
    ) -> None:
        """even: whether every process must sample as many images as the others; what is too many is not looked at."""
        self.model, self.rewards, self.encoded = model, rewards, encoded
        self.digest = hashlib.sha256(json.dumps([p.text for p in prompts]).encode()).hexdigest()[:16]
        self.index = list(range(len(prompts)))[accelerator.process_index :: accelerator.num_processes]
        self.prompts = [prompts[i] for i in self.index]
        self.per_prompt, self.batch_size, self.pulse = images_per_prompt, batch_size, pulse
        most = -(-len(prompts) // accelerator.num_processes)
        self.extra = (most - len(self.index)) * images_per_prompt if even else 0
        self.filler = list(prompts[:1]) if self.extra else []

    def run(self, levels: Level, guidance: Guidance, base_steps: int = 0) -> tuple[dict[str, float], Shown]:
        """Figures of the weights in use, over all processes, and images to show. base_steps: see ``SamplingPlan``.

        ``accuracy`` is the mean of the first reward, also by task where prompts carry a "tag"; then the mean of each
        reward, and ``diversity``, the pairwise distance within a prompt.
        """
        prompts = [p for p in self.prompts for _ in range(self.per_prompt)]
        place = torch.arange(len(prompts))
        own, sample = place // self.per_prompt, place % self.per_prompt
        images = self._images(SamplingPlan(ode_plan(len(levels) - 1), levels, guidance, base_steps), own, sample)
        found = score(self.rewards, images, prompts) if prompts else dict.fromkeys(self.rewards, torch.empty(0))
        scores = {name: found[name] for name in self.rewards}
        rows = [
            (self.index[i // self.per_prompt], i % self.per_prompt, str(p.metadata.get("tag", "all")), *values)
            for i, (p, *values) in enumerate(zip(prompts, *(scores[name].tolist() for name in scores), strict=True))
        ]
        spread = [(len(self.prompts), pairwise_distance(images, own))] if prompts and self.per_prompt > 1 else []
        everything, spread = sorted(gather_object(rows)), gather_object(spread)
        diversity = sum(n * value for n, value in spread) / sum(n for n, _ in spread) if spread else None
        chosen = torch.tensor(spread_evenly(len(self.prompts), SHOWN), dtype=torch.long) * self.per_prompt
        shown = Shown(
            [prompts[i].text for i in chosen.tolist()],
            images[chosen],
            {name: scores[name][chosen] for name in scores},
            torch.tensor([row[0] for row in everything]),
            [row[2] for row in everything],
            {name: torch.tensor([row[3 + k] for row in everything]) for k, name in enumerate(scores)},
            diversity,
            f"{self.digest} {self.per_prompt} images, {len(levels) - 1} steps, guidance {guidance.scale}",
        )
        return summary(shown), shown

    def _images(self, route: SamplingPlan, own: Tensor, sample: Tensor) -> Tensor:
        """Those of this process, which may have none: (B, 3, H, W)."""
        count = len(own)
        if not count + self.extra:
            return torch.empty(0, 3, 1, 1)
        drawn = [*self.prompts, *self.filler]
        own, sample = pad(own, (0, self.extra), value=len(drawn) - 1), pad(sample, (0, self.extra))
        # Noise is addressed by the prompt's place in the file: the same images on any number of processes.
        place = torch.tensor([*self.index, *(0 for _ in self.filler)])
        addresses = NoiseKeys(KeyedRNG(EVALUATION_SEED), "evaluation", 0, place[own], sample)
        conditioning = self.encoded.rows([p.text for p in drawn])
        found = []
        with self.model.keeping(VAE):
            for _, images in generate(self.model, route, conditioning, own, addresses, self.batch_size):
                found.append(images.cpu())
                self.pulse()
        return torch.cat(found)[:count]


def summary(shown: Shown) -> dict[str, float]:
    """The figures to log."""
    first = next(iter(shown.scores.values()))
    result = summarise(first, shown.tags)
    if len(set(shown.tags)) == 1:
        result = {"accuracy": result["accuracy"]}
    result |= {name: values.nanmean().item() for name, values in shown.scores.items()}
    return result if shown.diversity is None else result | {"diversity": shown.diversity}
