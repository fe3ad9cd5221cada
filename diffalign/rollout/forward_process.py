"""The forward process: noise clean latents at training times, and predict with any weight sets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from diffalign.data.crops import SizeConditioning
from diffalign.diffusion.parameterization import add_noise, target
from diffalign.models import DiffusionModel
from diffalign.models.weights import POLICY
from diffalign.runtime.run import Run
from diffalign.structures import Conditioning, EditInput, Guidance, Input, Level

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class TimeSampling:
    """Distribution of training times, as fractions of the schedule.

    Attributes:
        kind: "uniform" in [0, 1), or "logit_normal": sigmoid of a normal number.
        mean: Mean of the normal number.
        std: Its standard deviation.
        values: Timesteps to draw from instead, in units of the model; empty: all.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Noised:
    """Noised latents.

    Attributes:
        x: (B, C, *spatial).
        level: (B,), noise level of each.
        noise: (B, C, *spatial), standard normal.
        target: (B, C, *spatial), what the model should predict.
    """

    x: Tensor
    level: Level
    noise: Tensor
    target: Tensor


def noised(model: DiffusionModel, x0: Tensor, noise: Tensor, level: Level) -> Noised:
    """Noise clean latents (B, C, *spatial) to levels (B,)."""
    return Noised(add_noise(x0, noise, level), level, noise, target(model.parameterization, x0, noise, level))


class ForwardProcess:
    """Draw times, noise and dropped prompts per sample and optimizer step, independent of the batch; predict.

    Args:
        run: The training.
        times: Distribution of training times.
        prompt_dropout: Share of prompts to replace by the empty one.
    """

    def __init__(self, run: Run[Any], times: TimeSampling, prompt_dropout: float = 0.0) -> None:
        self.run, self.model, self.times, self.prompt_dropout = run, run.model, times, prompt_dropout

    def noise(self, x0: Tensor, ids: Sequence[int], step: int) -> Noised:
        """Noise clean latents for an optimizer step.

        Args:
            x0: (B, C, *spatial).
            ids: Identity of each sample within the step; samples of one identity share time and noise.
            step: Index of the optimizer step, from 0.
        """
        known, rows = _unique(ids)
        level = self.model.level_at(self.sample_times(known, step))[rows]
        noise = self.run.rng.normal_batch(x0.shape[1:], "noise", [(step, i) for i in known])[rows]
        device = self.model.device
        return noised(self.model, x0.to(device, non_blocking=True), noise.to(device, non_blocking=True), level)

    def sample_times(self, ids: Sequence[int], step: int) -> Tensor:
        """Sample training times, (B,), float64, in units of the model's timesteps."""
        times, end = self.times, self.model.num_train_timesteps
        generators = [self.run.rng.generator("time", step, i) for i in ids]
        if times.values:
            return torch.tensor([times.values[g.integers(len(times.values))] for g in generators], dtype=torch.float64)
        if times.kind == "uniform":
            return torch.tensor([g.random() for g in generators], dtype=torch.float64) * end
        normal = torch.tensor([g.standard_normal() for g in generators], dtype=torch.float64)
        return torch.sigmoid(times.mean + times.std * normal) * end

    def conditioning(
        self,
        inputs: Sequence[Input],
        ids: Sequence[int],
        step: int,
        sizes: Sequence[SizeConditioning] | None = None,
    ) -> Conditioning:
        """Return the conditioning of samples, with dropped prompts; a row per sample.

        Args:
            inputs: B prompts. A dropped one keeps its source image.
            ids: Identity of each sample; samples of one identity are dropped together.
            step: Index of the optimizer step, from 0.
            sizes: Crop and original size of each image, for models that are conditioned on them.
        """
        dropped = {i: self.run.rng.generator("dropout", step, i).random() < self.prompt_dropout for i in set(ids)}
        conditioning = self._encoded(inputs, [dropped[i] for i in ids])
        if sizes is None:
            return conditioning
        names = ("original_size", "crop_top_left", "target_size")
        return self.model.with_sizes(conditioning, *(torch.tensor([getattr(s, n) for s in sizes]) for n in names))

    def _encoded(self, inputs: Sequence[Input], dropped: Sequence[bool]) -> Conditioning:
        """Encode prompts, those that are dropped as the empty one."""
        prompts = self.run.prompts
        if self.model.edits:
            return prompts(
                [
                    prompts.dropped(given) if drop and isinstance(given, EditInput) else given
                    for given, drop in zip(inputs, dropped, strict=True)
                ]
            )
        known, row_of = _unique(inputs)
        rows = torch.where(torch.tensor(dropped), len(known), row_of)
        return Conditioning.cat([prompts(known), prompts.empty])[rows]

    def predict(
        self,
        noised: Noised,
        conditioning: Conditioning,
        weight_sets: Sequence[str] = (POLICY,),
        guidance: Guidance | None = None,
    ) -> Mapping[str, Tensor]:
        """Predict with each of several weight sets; only the policy's prediction has a gradient.

        The policy comes last, so that the others' activations are freed before its graph is built.

        Returns:
            Weight set -> output (B, C, *spatial).
        """
        outputs = {}
        for name in weight_sets:
            if name != POLICY:
                with torch.no_grad(), self.model.using(name):
                    outputs[name] = self.model.predict(noised.x, noised.level, conditioning, guidance)
        if POLICY in weight_sets:
            outputs[POLICY] = self.model.predict(noised.x, noised.level, conditioning, guidance)
        return outputs


def _unique(items: Sequence[H]) -> tuple[list[H], Tensor]:
    """Return the distinct items in order, and the index of each item among them."""
    index = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return list(index), torch.tensor([index[item] for item in items])
