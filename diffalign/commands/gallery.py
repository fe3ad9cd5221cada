"""Images of several models for the same prompts and noise, on disk, with their rewards; an interrupted one goes on.

<folder>/settings.json             what the images depend on; another evaluation in the same folder is refused
         <model>/weights.json      which weights drew them
         <model>/images/00012-0.png    prompt 12, sample 0
         <model>/scores-<process>.jsonl    {"prompt", "sample", "rewards"}, written once the image is there
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from diffalign.commands.resume import drop_partial_line, same_or_new, whole_rows
from diffalign.evaluation.checkpoints import Subject
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.models import DiffusionModel, with_tuned_weights
from diffalign.models.checkpoint_context import weights_file
from diffalign.models.offload import VAE
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rewards.base import Reward
from diffalign.rewards.support.preprocess import to_bytes
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.rollout.scoring import score
from diffalign.structures import Guidance, Prompt

AHEAD = 8  # batches whose prompts are encoded at once


class Gallery:
    """A folder of images and rewards. ``process`` of ``processes`` draws its share of the prompts.

    cache: a folder for prompt embeddings. allow_partial: as for ``with_tuned_weights``.

    ValueError: the folder holds images of other settings, prompts or rewards.
    """

    def __init__(
        self,
        folder: Path,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        *,
        process: int = 0,
        processes: int = 1,
        cache: Path | None = None,
        allow_partial: bool = False,
        places: Sequence[int] | None = None,
    ) -> None:
        """Open or make the folder.

        places: of ``prompts`` in their file, where they are only some of it. allow_partial: see ``with_tuned_weights``.
        """
        self.allow_partial = allow_partial
        self.folder, self.sampling, self.prompts, self.rewards = folder, sampling, prompts, rewards
        self.process, self.processes, self.cache = process, processes, cache
        self.places = torch.arange(len(prompts)) if places is None else torch.tensor(places)
        self._encoded: dict[str, PromptEmbeddingCache] = {}
        texts = json.dumps([[p.text, dict(p.metadata)] for p in prompts], sort_keys=True)
        settings = {
            **asdict(sampling),
            "rewards": list(rewards),
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
        }
        if self.places.tolist() != list(range(len(prompts))):
            settings["places"] = self.places.tolist()
        folder.mkdir(parents=True, exist_ok=True)
        same_or_new(folder / "settings.json", settings)

    def draw(self, model: DiffusionModel, subject: Subject, size: int, progress: Callable[[int], object]) -> None:
        """Draws and scores what is missing of this process's share, ``size`` images at a time.

        progress: called with the number of images after each batch, and first with those that were there.
        """
        place = self._place(subject)
        (place / "images").mkdir(parents=True, exist_ok=True)
        same_or_new(place / "weights.json", self._weights(model, subject))
        own = self._own()
        done = {(row["prompt"], row["sample"]) for row in self._rows(subject)}
        missing = [pair for pair in own if pair not in done]
        progress(len(own) - len(missing))
        if not missing:
            return
        drop_partial_line(place / f"scores-{self.process}.jsonl")
        with with_tuned_weights(model, subject.path, subject.scale, allow_partial=self.allow_partial):
            # A subject's weights may be those of the text encoders too.
            encoded = PromptEmbeddingCache(model, folder=self.cache)
            encoded = self._encoded.setdefault(encoded.identity, encoded)
            route = SamplingPlan(
                ode_plan(self.sampling.num_steps),
                model.levels(self.sampling.num_steps, self.sampling.schedule),
                self._guidance(model, encoded),
                self.sampling.base_steps if subject.path else 0,
            )
            with model.keeping(VAE):
                for i in range(0, len(missing), size):
                    if i % (AHEAD * size) == 0:
                        encoded.prepare([self.prompts[prompt].text for prompt, _ in missing[i : i + AHEAD * size]])
                    progress(self._draw(model, route, encoded, place, missing[i : i + size]))

    def _guidance(self, model: DiffusionModel, encoded: PromptEmbeddingCache) -> Guidance:
        scale = self.sampling.guidance_scale
        if model.negative is None:
            return encoded.guidance(scale)
        if not model.guides(scale):
            raise ValueError("a negative prompt acts by guidance: give the guidance_scale that it was trained with")
        return Guidance(scale, model.negative.conditioning(model.negative()))

    def _draw(
        self,
        model: DiffusionModel,
        route: SamplingPlan,
        encoded: PromptEmbeddingCache,
        place: Path,
        chunk: list[tuple[int, int]],
    ) -> int:
        prompts = [self.prompts[prompt] for prompt, _ in chunk]
        prompt, sample = torch.tensor(chunk).T
        addresses = NoiseKeys(KeyedRNG(self.sampling.seed), "evaluation", 0, self.places[prompt], sample)
        conditioning = encoded([p.text for p in prompts])
        ((_, images),) = generate(model, route, conditioning, torch.arange(len(chunk)), addresses, len(chunk))
        scores = score(self.rewards, images, prompts)
        with (place / f"scores-{self.process}.jsonl").open("a", encoding="utf-8") as file:
            for row, (number, member) in enumerate(chunk):
                to_pil_image(to_bytes(images[row]).cpu()).save(self._file(place, number, member))
                values = {name: scores[name][row].item() for name in self.rewards}
                known = {name: value if value == value else None for name, value in values.items()}
                file.write(json.dumps({"prompt": number, "sample": member, "rewards": known}) + "\n")
        return len(chunk)

    def load(self, subject: Subject) -> ScoredImages:
        """What is there of one model. ValueError: images are missing."""
        rows = {(row["prompt"], row["sample"]): row["rewards"] for row in self._rows(subject)}
        wanted = [(p, s) for p in range(len(self.prompts)) for s in range(self.sampling.images_per_prompt)]
        if missing := [pair for pair in wanted if pair not in rows]:
            raise ValueError(f"{self._place(subject)} lacks {len(missing)} images: run the same command again")
        scores = {
            name: torch.tensor([torch.nan if (v := rows[pair][name]) is None else v for pair in wanted])
            for name in self.rewards
        }
        files = [self._file(self._place(subject), *pair) for pair in wanted]
        return ScoredImages(torch.tensor([p for p, _ in wanted]), scores, files)

    def _own(self) -> list[tuple[int, int]]:
        numbers = range(self.process, len(self.prompts), self.processes)
        return [(number, member) for number in numbers for member in range(self.sampling.images_per_prompt)]

    def _place(self, subject: Subject) -> Path:
        return self.folder / re.sub(r"[^\w.@-]+", "-", subject.name)

    @staticmethod
    def _file(place: Path, prompt: int, sample: int) -> Path:
        return place / "images" / f"{prompt:05d}-{sample}.png"

    def _rows(self, subject: Subject) -> list[dict]:
        """The rows of all processes, without a last line that a crash cut short."""
        return [row for path in sorted(self._place(subject).glob("scores-*.jsonl")) for row in whole_rows(path)]

    def _weights(self, model: DiffusionModel, subject: Subject) -> dict:
        if subject.path is None:
            return {"base": True}
        found = weights_file(model, subject.path)
        files = [found] if found.is_file() else sorted(found.glob("*.safetensors"))
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return {"scale": subject.scale, "sha256": digest.hexdigest()}
