"""ReFL (arXiv 2304.05977) and its relatives: a reward's own gradient, through the image, into the denoiser.

An optimizer step takes ``num_groups`` prompts and ``group_size`` images of each. Batches of them are sampled without
gradients to a place that the recipe draws; from there a few calls of the denoiser are recorded, their end is decoded
and judged, and the gradient comes back. Which calls, and what is judged, is a row of
``diffusion.reward_gradient_presets.PRESETS``.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.config import PreferenceDataConfig
from diffalign.models import DiffusionModel
from diffalign.models.offload import VAE
from diffalign.models.performance import set_performance
from diffalign.rewards.base import Reward, RewardFunction
from diffalign.rewards.config import build_rewards
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.record import reward_record
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.generate import NoiseKeys
from diffalign.rollout.sampler import SamplingPlan, micro_batches
from diffalign.rollout.scoring import RewardWarning, check_unscored
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.endings import diverged
from diffalign.runtime.loop import Loop, Metrics, MicroBatch, MiniBatch
from diffalign.runtime.provenance import digest
from diffalign.structures import Guidance, Level, Prompt
from diffalign.trainers.arguments import check_differentiable, dataset, evaluation_rewards, reward_table
from diffalign.trainers.base import Trainer, named_model
from diffalign.trainers.contents import sample_contents
from diffalign.trainers.refl.config import ReFLConfig
from diffalign.trainers.refl.hacking_monitor import Watch
from diffalign.trainers.refl.initial_states import (
    Batch,
    BufferStarts,
    ImageStarts,
    NoiseStarts,
    Pictures,
    Starts,
    advance,
    draw_courses,
    places,
    sampling_plan,
)
from diffalign.trainers.refl.reward_gradient import RewardGradient
from diffalign.trainers.refl.reward_loss import Judge, thresholds


class ReFLTrainer(Trainer):
    """Train a model on the gradient of rewards, with ReFL and related methods.

    model: a path, a hub id or a ``DiffusionModel``; default ``args.model``. args: the configuration.
    reward_funcs: differentiable rewards; as for ``FlowGRPOTrainer``. train_dataset, eval_dataset: lists of ``Prompt``;
        default: the files that ``args`` names.

    ValueError or FileNotFoundError before any work where something is missing or does not fit.
    """

    name = "refl"
    grad_through = (VAE,)
    args: ReFLConfig

    def __init__(
        self,
        model: str | Path | DiffusionModel | None = None,
        args: ReFLConfig | None = None,
        reward_funcs: str | RewardFunction | Reward | Sequence | Mapping[str, float] | None = None,
        train_dataset: Sequence[Prompt] | None = None,
        eval_dataset: Sequence[Prompt] | None = None,
    ) -> None:
        args = named_model(args or ReFLConfig(), model)
        args.validate()
        given = args.rewards if reward_funcs is None else reward_funcs
        self.rewards, weights = reward_table(given, args.allow_reward_code)
        check_differentiable(self.rewards)
        args = args if reward_funcs is None else dataclasses.replace(args, rewards=reward_record(given, self.rewards))
        self.recipe = args.recipe.resolve()
        bounds = thresholds(self.recipe, self.rewards, args.thresholds)
        prompts = None
        if not (args.train_rollouts or self.recipe.from_images):
            prompts = dataset(train_dataset, args.train_prompts, "train_prompts")
        try_rewards(self.rewards, prompts or (), args.resolution)
        held_out, _ = build_rewards(args.held_out, args.allow_reward_code)
        judges = evaluation_rewards(args.eval_rewards, self.rewards, args.allow_reward_code)
        super().__init__(
            model,
            args,
            {**judges, **self.rewards, **held_out},
            eval_dataset,
            keep_reference=self.recipe.regulariser == "reference" or bool(args.base_share),
            eval_batch_size=args.eval_batch_size,
        )
        if args.vae_checkpointing:
            self.model.pipeline.vae.enable_gradient_checkpointing()
        size, dtype = args.decode_slice, args.decode_dtype
        self.judge = Judge(self.model, self.rewards, weights, bounds, self.recipe, size, dtype)
        self.updates_per_iteration = 1
        self.levels = self.model.levels(self.recipe.num_steps, args.schedule)
        self.pictures = self._pictures(args.data)
        self.starts = self._starts(prompts)
        self.gradient = RewardGradient(self, self.judge)
        if self.pictures is not None:
            self.data_contents = {"samples of train_images": sample_contents(self.pictures.data)}
        self.data_digest = digest([prompt.text for prompt in prompts or ()])
        self.watch = Watch(self, self.rewards, list(held_out))

    def prepare(self, keep_reference: bool) -> Loop:
        """Make the denoiser trainable, or a negative prompt if the recipe trains one."""
        if not self.model.guides(self.guidance_scale):
            off = f"guidance_scale {self.guidance_scale:g} does not guide this model"
            if self.recipe.negative:
                least = self.model.unguided_scale
                raise ValueError(f"a negative prompt acts by guidance, and {off}: give one above {least:g}")
            if self.recipe.compensate:
                raise ValueError(f"recipe.compensate divides by a guidance that is off ({off}): leave it out")
        if not self.recipe.negative:
            return super().prepare(keep_reference)
        if self.shards is not None:
            raise ValueError("FSDP2 does not train a negative prompt, whose denoiser stays as it is: use ddp.yaml")
        negative = self.model.train_negative()
        set_performance(self.model, self.args.attention, self.args.mixed_precision, self.args.compile)
        loop = Loop(self, negative, self.args, self.accelerator)
        # For its precision: what does not train needs no wrapper that shares gradients.
        self.model.denoiser = self.accelerator.prepare_model(self.model.raw_denoiser, evaluation_mode=True)
        return loop

    def _pictures(self, settings: PreferenceDataConfig) -> Pictures | None:
        args = self.args
        if not args.train_images:
            return None
        return Pictures(args.train_images, settings, self.model, self.noise, args.num_groups)

    def _starts(self, prompts: Sequence[Prompt] | None) -> Starts:
        args, recipe, shape = self.args, self.recipe, self.model.latent_shape()
        if args.train_rollouts:
            return BufferStarts(
                args.train_rollouts, args.num_groups, args.group_size, self.noise, shape, recipe.num_steps
            )
        if recipe.from_images:
            assert self.pictures is not None
            return ImageStarts(self.pictures, self.levels, recipe.first)
        assert prompts is not None
        return NoiseStarts(prompts, args.num_groups, self.noise, shape)

    def check_batches(self, processes: int) -> None:
        """ValueError where images or groups do not divide over the processes."""
        self.args.validate_batches(processes)

    # Guidance -------------------------------------------------------------------------------------------------------

    @property
    def guidance(self) -> Guidance:
        """Guidance of every sampling, with the current negative prompt if one is trained."""
        if self.model.negative is None:
            return super().guidance
        return Guidance(self.guidance_scale, self.model.negative.conditioning(self.loop.module()))

    @property
    def grad_guidance(self) -> Guidance | None:
        """Guidance of the calls that gradients pass through."""
        if self.recipe.guidance == "off":
            return None
        return dataclasses.replace(self.guidance, detached=self.recipe.guidance == "detached")

    # Sampling -------------------------------------------------------------------------------------------------------

    @property
    def eval_levels(self) -> Level:
        """Levels of ``eval_num_steps``, else of the recipe."""
        return self.model.levels(self.args.eval_num_steps or self.recipe.num_steps, self.args.schedule)

    @property
    def eval_base_steps(self) -> int:
        """Steps of ``base_share``."""
        return round(self.args.base_share * (len(self.eval_levels) - 1))

    def collect(self, iteration: int) -> Metrics:
        """Sample this process's images up to the steps that their gradient paths need."""
        started, args = time.perf_counter(), self.args
        share = args.num_groups * args.group_size // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        own = [divmod(first + place, args.group_size) for place in range(share)]
        self.iteration = iteration
        self.batches = []
        self.encoded.prepare(self._texts(iteration, own))
        with self.model.keeping(VAE):
            for rows in micro_batches(share, args.rollout_batch_size):
                self.loop.pulse(together=True)
                # Processes that gather weights together go through courses of one length.
                lead = own[rows.start] if self.shards is None else divmod(rows.start, args.group_size)
                self.batches.append(self._batch(iteration, own[rows], lead))
        return {"images_per_second": args.num_groups * args.group_size / (time.perf_counter() - started)}

    def _texts(self, iteration: int, samples: Sequence[tuple[int, int]]) -> list[str]:
        """Return all prompts that an iteration encodes, its update included."""
        prompts = self.starts.prompts_of(iteration, samples)
        if self.recipe.regulariser == "pretraining":
            assert self.pictures is not None
            prompts += self.pictures.prompts_of(iteration, [group for group, _ in samples])
        return [prompt.text for prompt in prompts]

    def _batch(self, iteration: int, samples: Sequence[tuple[int, int]], lead: tuple[int, int]) -> Batch:
        """Sample a batch up to its gradient paths. lead: the sample whose random numbers choose the paths."""
        courses = draw_courses(self.recipe, self.noise, iteration, lead)
        kept = places(courses, self.recipe.num_steps)
        start = self.starts(iteration, samples, kept[0])
        conditioning = self.encoded([prompt.text for prompt in start.prompts])
        plan = sampling_plan(self.recipe)
        group, member = torch.tensor(samples).T
        buffer = RolloutBuffer.allocate(
            plan, group, member, start.prompts, start.x.shape[1:], device=self.model.device, steps=kept
        )
        noise = NoiseKeys(self.noise, "refl", iteration, group, member)
        shape = self.model.latent_shape()
        draw_noise = lambda index: noise.step(shape, index)  # noqa: E731
        advance(self.model, SamplingPlan(plan, self.levels, self.guidance), conditioning, start, buffer, draw_noise)
        return Batch(courses, samples, start.prompts, conditioning, buffer)

    def ids(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """Prompt, group and sample index of each image of the iteration."""
        return [
            {"prompt": prompt.text, "group": group, "member": member}
            for batch in self.batches
            for prompt, (group, member) in zip(batch.prompts, batch.samples, strict=True)
        ]

    # Update ---------------------------------------------------------------------------------------------------------

    def minibatches(self, iteration: int) -> Iterator[MiniBatch]:
        """Yield the one optimizer step of an iteration: a pass per gradient path and part of a batch."""
        total = sum(len(batch.samples) for batch in self.batches)
        micros = []
        for batch in self.batches:
            for rows in torch.arange(len(batch.samples)).split(self.args.train_batch_size):
                weight = len(rows) / (total * len(batch.courses))
                micros += [MicroBatch(rows, weight, path, batch) for path in range(len(batch.courses))]
        yield MiniBatch(micros, torch.arange(total))

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some samples on one gradient path, and metrics."""
        return self.gradient(micro.data, micro.rows, micro.tag)

    # Watching it ----------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Metrics:
        """Evaluate the held-out prompts, and monitor reward hacking."""
        figures = super().evaluate(step)
        return {**figures, **self.watch(step, figures)} if figures else {}

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Note whether there was a gradient. ValueError: rewards failed on too many images."""
        self._moved = metrics["grad_norm"] > 0
        if failures := self.judge.failures(some=metrics["unscored"] > 0):
            warnings.warn(failures, RewardWarning, stacklevel=2)
        if metrics["unscored"] and not all(batch.buffer.x.isfinite().all() for batch in self.batches):
            raise diverged(self.loop, "the model's images are not finite")  # no fault of the rewards
        check_unscored(metrics["unscored"], self.args.max_unscored, extremes(self.args))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of the hacking monitor."""
        return self.watch.state()

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        self.watch.restore(tensors, plain)

    def finish(self) -> list[Path]:
        """Export the best weights if early stopping kept some, and plot the monitored metrics."""
        if self.watch.use_best():
            super().evaluate(self.watch.best_step)  # so that the card tells of the weights beside it
        written = super().finish()
        if self.accelerator.is_main_process and self.eval_prompts:
            written.append(self.watch.draw())
        return written

    # Checks ---------------------------------------------------------------------------------------------------------

    def probe(self) -> list[Tensor]:
        """Outputs of the first recorded call for the first batch."""
        batch = self.batches[0]
        rows = torch.arange(min(self.args.train_batch_size, len(batch.samples)))
        return [self.gradient.unrolled(batch, rows, 0).calls[0].output]

    @property
    def has_gradient(self) -> bool:
        """Whether the last optimizer step had one: rewards may be equal for all samples."""
        return self._moved
