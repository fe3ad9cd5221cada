"""Sample and score images of several models from the same prompts and noise into a folder; resumable.

<folder>/settings.json             settings of all images; other settings in the same folder are an error
         <model>/weights.json      scale and digest of the weights
         <model>/images/00012-0.png    prompt 12, sample 0
         <model>/scores-<process>.jsonl    {"prompt", "sample", "rewards"}, one line per image, after its file
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from diffalign.commands.resume import drop_partial_line, read_rows, write_or_check_settings
from diffalign.evaluation.checkpoints import CheckpointSpec
from diffalign.evaluation.sampling import SamplingSettings
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.models import DiffusionModel, with_tuned_weights
from diffalign.models.checkpoint_context import weights_file
from diffalign.models.editing import check_sources
from diffalign.models.offload import VAE
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rewards.base import Reward
from diffalign.rewards.support.preprocess import to_bytes
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.rollout.scoring import score
from diffalign.structures import Guidance, Prompt

PREFETCH = 8  # batches whose prompts are encoded at once


class Gallery:
    """A folder of generated images and their rewards, filled by one or several processes."""

    def __init__(
        self,
        folder: Path,
        sampling: SamplingSettings,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        *,
        process: int = 0,
        processes: int = 1,
        cache: Path | None = None,
        allow_partial: bool = False,
        prompt_indices: Sequence[int] | None = None,
    ) -> None:
        """Create the folder, or open it to resume.

        Args:
            folder: Output folder.
            sampling: Settings shared by all models.
            prompts: P prompts.
            rewards: Name -> reward.
            process: Rank of this process, which samples prompts ``process::processes``.
            processes: World size.
            cache: Folder for prompt embeddings; None keeps them in memory.
            allow_partial: See ``with_tuned_weights``.
            prompt_indices: Index of each prompt in its file, which keys the noise; default: 0 to P - 1.

        Raises:
            ValueError: The folder holds images of other settings, prompts or rewards.
        """
        self.allow_partial = allow_partial
        self.folder, self.sampling, self.prompts, self.rewards = folder, sampling, prompts, rewards
        self.process, self.processes, self.cache = process, processes, cache
        self.prompt_indices = torch.tensor(list(range(len(prompts)) if prompt_indices is None else prompt_indices))
        self._encoded: dict[str, PromptEmbeddingCache] = {}
        texts = json.dumps([[p.text, dict(p.metadata)] for p in prompts], sort_keys=True)
        settings = {
            **asdict(sampling),
            "rewards": list(rewards),
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
        }
        if self.prompt_indices.tolist() != list(range(len(prompts))):
            settings["places"] = self.prompt_indices.tolist()  # key of existing folders
        folder.mkdir(parents=True, exist_ok=True)
        write_or_check_settings(folder / "settings.json", settings)

    def draw(self, model: DiffusionModel, spec: CheckpointSpec, size: int, progress: Callable[[int], object]) -> None:
        """Sample and score the missing images of this process.

        Args:
            model: The base model; the weights of ``spec`` are loaded into it temporarily.
            spec: The weights to sample with.
            size: Images per batch.
            progress: Called with the number of existing images, then with the number of images of each batch.
        """
        check_sources(model, self.prompts)
        folder = self.model_folder(spec)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        write_or_check_settings(folder / "weights.json", self._weights(model, spec))

        missing = self.missing(spec)
        progress(len(self.pairs()) - len(missing))
        if not missing:
            return
        drop_partial_line(folder / f"scores-{self.process}.jsonl")

        with with_tuned_weights(model, spec.path, spec.scale, allow_partial=self.allow_partial):
            # The spec may replace text encoder weights too.
            encoded = PromptEmbeddingCache(model, folder=self.cache)
            encoded = self._encoded.setdefault(encoded.identity, encoded)
            plan = SamplingPlan(
                ode_plan(self.sampling.num_steps),
                model.levels(self.sampling.num_steps, self.sampling.schedule),
                self._guidance(model, encoded),
                self.sampling.base_steps if spec.path else 0,
            )
            with model.keeping(VAE):
                for i in range(0, len(missing), size):
                    if i % (PREFETCH * size) == 0:
                        encoded.prepare([self.prompts[prompt].input for prompt, _ in missing[i : i + PREFETCH * size]])
                    progress(self._draw(model, plan, encoded, folder, missing[i : i + size]))

    def missing(self, spec: CheckpointSpec) -> list[tuple[int, int]]:
        """List the (prompt, sample) pairs of this process without scores or without an image file."""
        done = {(row["prompt"], row["sample"]) for row in self._rows(spec)}
        return [pair for pair in self.pairs() if pair not in done or not self.file(spec, *pair).is_file()]

    def file(self, spec: CheckpointSpec, prompt: int, sample: int) -> Path:
        """Return the path of an image."""
        return self._file(self.model_folder(spec), prompt, sample)

    def _guidance(self, model: DiffusionModel, encoded: PromptEmbeddingCache) -> Guidance:
        scale = self.sampling.guidance_scale
        if model.negative is None:
            return encoded.guidance(scale)
        if not model.guides(scale):
            raise ValueError(
                "a trained negative prompt needs guidance: give the guidance_scale that it was trained with"
            )
        return Guidance(scale, model.negative.conditioning(model.negative()))

    def _draw(
        self,
        model: DiffusionModel,
        plan: SamplingPlan,
        encoded: PromptEmbeddingCache,
        folder: Path,
        chunk: list[tuple[int, int]],
    ) -> int:
        prompts = [self.prompts[prompt] for prompt, _ in chunk]
        prompt, sample = torch.tensor(chunk).T
        noise_keys = NoiseKeys(KeyedRNG(self.sampling.seed), "evaluation", 0, self.prompt_indices[prompt], sample)
        conditioning = encoded([p.input for p in prompts])
        ((_, images),) = generate(model, plan, conditioning, torch.arange(len(chunk)), noise_keys, len(chunk))
        scores = score(self.rewards, images, prompts)

        with (folder / f"scores-{self.process}.jsonl").open("a", encoding="utf-8") as file:
            for row, (prompt_index, sample_index) in enumerate(chunk):
                to_pil_image(to_bytes(images[row]).cpu()).save(self._file(folder, prompt_index, sample_index))
                values = {name: scores[name][row].item() for name in self.rewards}
                # NaN is not JSON
                plain = {name: None if math.isnan(value) else value for name, value in values.items()}
                file.write(json.dumps({"prompt": prompt_index, "sample": sample_index, "rewards": plain}) + "\n")
        return len(chunk)

    def load(self, spec: CheckpointSpec) -> ScoredImages:
        """Load the scores of one model. Raises ValueError if images are missing."""
        rows = {(row["prompt"], row["sample"]): row["rewards"] for row in self._rows(spec)}
        wanted = self.all_pairs()
        if missing := [pair for pair in wanted if pair not in rows]:
            raise ValueError(f"{self.model_folder(spec)} lacks {len(missing)} images: run the same command again")

        scores = {
            name: torch.tensor([torch.nan if (v := rows[pair][name]) is None else v for pair in wanted])
            for name in self.rewards
        }
        files = [self._file(self.model_folder(spec), *pair) for pair in wanted]
        return ScoredImages(torch.tensor([p for p, _ in wanted]), scores, files)

    def pairs(self) -> list[tuple[int, int]]:
        """List the (prompt, sample) pairs of this process."""
        prompts = range(self.process, len(self.prompts), self.processes)
        return [(prompt, sample) for prompt in prompts for sample in range(self.sampling.images_per_prompt)]

    def all_pairs(self) -> list[tuple[int, int]]:
        """List the (prompt, sample) pairs of all processes."""
        return [(p, s) for p in range(len(self.prompts)) for s in range(self.sampling.images_per_prompt)]

    def model_folder(self, spec: CheckpointSpec) -> Path:
        """Return the folder of a model's images."""
        return self.folder / spec.folder_name

    @staticmethod
    def _file(folder: Path, prompt: int, sample: int) -> Path:
        return folder / "images" / f"{prompt:05d}-{sample}.png"

    def _rows(self, spec: CheckpointSpec) -> list[dict]:
        """Read the score rows that all processes have written."""
        return [row for path in sorted(self.model_folder(spec).glob("scores-*.jsonl")) for row in read_rows(path)]

    def _weights(self, model: DiffusionModel, spec: CheckpointSpec) -> dict:
        if spec.path is None:
            return {"base": True}
        found = weights_file(model, spec.path)
        files = [found] if found.is_file() else sorted(found.glob("*.safetensors"))
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return {"scale": spec.scale, "sha256": digest.hexdigest()}
