"""Evaluate a model on held-out prompts: ODE sampling with fixed seeds, rewards, and diversity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

from diffalign.evaluation.accuracy import summarise
from diffalign.evaluation.diversity import pairwise_distance
from diffalign.evaluation.sampling import spread_evenly
from diffalign.models.editing import check_sources
from diffalign.models.offload import VAE
from diffalign.rewards.base import Reward, wants_latents
from diffalign.rewards.support.sources import source_images
from diffalign.rewards.support.weights import resident
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, decode, generate_latents
from diffalign.rollout.sampler import SamplingPlan
from diffalign.rollout.scoring import score
from diffalign.runtime.run import Run
from diffalign.structures import Prompt

EVALUATION_SEED = 0  # the same noise for runs with different seeds
MAX_SHOWN = 12  # prompts in grids and logged images


@dataclass(frozen=True)
class Shown:
    """Results of an evaluation, for grids and tables.

    Attributes:
        prompts: P prompts of this process.
        images: (P, 3, H, W), the first image of each of ``prompts``.
        marks: Reward -> (P,) scores of ``images``, the primary reward first.
        prompt: (N,) prompt index of every image of all processes, sorted by prompt and sample.
        tags: N task tags.
        scores: Reward -> (N,).
        diversity: Pairwise pixel distance within a prompt; None with one image per prompt.
        about: Digest of prompts and settings; evaluations with equal ``about`` are comparable.
        sources: (P, 3, H, W), source images of edits; None for models that do not edit.
    """

    prompts: list[Prompt]
    images: Tensor
    marks: dict[str, Tensor]
    prompt: Tensor
    tags: list[str]
    scores: dict[str, Tensor]
    diversity: float | None
    about: str = ""
    sources: Tensor | None = None

    @property
    def texts(self) -> list[str]:
        """Texts of the prompts."""
        return [prompt.text for prompt in self.prompts]


class Evaluation:
    """Sample and score held-out prompts, which are split over all processes."""

    def __init__(
        self,
        run: Run[Any],
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        *,
        trained: Collection[str] = (),
        even: bool = False,
    ) -> None:
        """Select the prompts of this process.

        Args:
            run: The training, whose model and weights in use are evaluated.
            prompts: All held-out prompts.
            rewards: Name -> reward, the primary reward first.
            trained: Names of those that the run trains on; the networks of the others leave the device after use.
            even: Pad with discarded images, so that all ranks sample equally many (needed for sharded weights).
        """
        self.model, self.rewards, self.encoded, self.heartbeat = run.model, rewards, run.prompts, run.heartbeat
        self.device, self.trained = run.accelerator.device, trained
        inputs = [p.input if run.model.edits else p.text for p in prompts]
        self.digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        self.index = list(range(len(prompts)))[run.rank :: run.world]
        self.prompts = [prompts[i] for i in self.index]
        check_sources(run.model, self.prompts)
        self.per_prompt, self.batch_size = run.config.eval_images_per_prompt, 1
        most = -(-len(prompts) // run.world)
        self.extra = (most - len(self.index)) * self.per_prompt if even else 0
        self.filler = list(prompts[:1]) if self.extra else []

    def run(self, plan: SamplingPlan) -> tuple[dict[str, float], Shown]:
        """Evaluate the weights in use.

        Args:
            plan: How to sample.

        Returns:
            Metrics over all processes, and the scored images. "accuracy" is the mean of the first reward, also per
            task where prompts have a "tag"; each reward has its mean under its name; "diversity" is the pairwise
            distance within a prompt.
        """
        prompts = [p for p in self.prompts for _ in range(self.per_prompt)]
        row = torch.arange(len(prompts))
        own, sample = row // self.per_prompt, row % self.per_prompt
        images, latents = self._samples(plan, own, sample)
        scores = dict.fromkeys(self.rewards, torch.empty(0))
        if prompts:
            scores = {name: self._score(name, images, prompts, latents) for name in self.rewards}

        rows = [
            (self.index[i // self.per_prompt], i % self.per_prompt, str(p.metadata.get("tag", "all")), *values)
            for i, (p, *values) in enumerate(zip(prompts, *(scores[name].tolist() for name in scores), strict=True))
        ]
        spread = [(len(self.prompts), pairwise_distance(images, own))] if prompts and self.per_prompt > 1 else []
        all_rows, spread = sorted(gather_object(rows)), gather_object(spread)
        diversity = sum(n * value for n, value in spread) / sum(n for n, _ in spread) if spread else None

        scale = 1.0 if plan.guidance is None else plan.guidance.scale
        chosen = torch.tensor(spread_evenly(len(self.prompts), MAX_SHOWN), dtype=torch.long) * self.per_prompt
        shown = Shown(
            [prompts[i] for i in chosen.tolist()],
            images[chosen],
            {name: scores[name][chosen] for name in scores},
            torch.tensor([row[0] for row in all_rows]),
            [row[2] for row in all_rows],
            {name: torch.tensor([row[3 + k] for row in all_rows]) for k, name in enumerate(scores)},
            diversity,
            f"{self.digest} {self.per_prompt} images, {len(plan.plan)} steps, guidance {scale}",
            self._sources([prompts[i] for i in chosen.tolist()]),
        )
        return summary(shown), shown

    def _sources(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Read the source images of prompts; None for models that do not edit."""
        if not self.model.edits or not prompts:
            return None
        return source_images([prompt.metadata for prompt in prompts], self.model.default_resolution)

    def _score(self, name: str, images: Tensor, prompts: Sequence[Prompt], latents: Tensor | None) -> Tensor:
        """Score on the device of the run, in batches; networks are moved there and back at most once."""
        one = {name: self.rewards[name]}
        with resident(leave=name not in self.trained):
            found = score(one, images, prompts, latents=latents, device=self.device, batch_size=self.batch_size)
        return found[name]

    def _samples(self, plan: SamplingPlan, own: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample the images of this process, (B, 3, H, W); B may be 0. Keep latents too if a reward wants them."""
        count = len(own)
        if not count + self.extra:
            return torch.empty(0, 3, 1, 1), None
        prompts = [*self.prompts, *self.filler]
        own, sample = pad(own, (0, self.extra), value=len(prompts) - 1), pad(sample, (0, self.extra))
        # keyed by index in the file: the same images for any world size
        index = torch.tensor([*self.index, *(0 for _ in self.filler)])
        noise_keys = NoiseKeys(KeyedRNG(EVALUATION_SEED), "evaluation", 0, index[own], sample)
        conditioning = self.encoded.rows([p.input for p in prompts])

        keep = any(map(wants_latents, self.rewards.values()))
        batches, latents = [], []
        with self.model.keeping(VAE):
            for _, final in generate_latents(self.model, plan, conditioning, own, noise_keys, self.batch_size):
                batches.append(decode(self.model, final).cpu())
                latents += [final.cpu()] if keep else []
                self.heartbeat()
        return torch.cat(batches)[:count], torch.cat(latents)[:count] if keep else None


def summary(shown: Shown) -> dict[str, float]:
    """Return the metrics to log."""
    first = next(iter(shown.scores.values()))
    result = summarise(first, shown.tags)
    if len(set(shown.tags)) == 1:
        result = {"accuracy": result["accuracy"]}
    result |= {name: values.nanmean().item() for name, values in shown.scores.items()}
    return result if shown.diversity is None else result | {"diversity": shown.diversity}
