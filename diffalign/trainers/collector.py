"""Rollouts for a trainer: prompts, images along a plan, rewards and advantages, in one buffer per iteration."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.data.epoch_order import take
from diffalign.diffusion.plan import make_plan, possible_plans
from diffalign.models.offload import VAE
from diffalign.rewards.base import Reward
from diffalign.rollout.advantages import flat_share, group_advantages
from diffalign.rollout.buffer import RolloutBuffer, bytes_needed, clear_buffer
from diffalign.rollout.generate import NoiseKeys, rollouts
from diffalign.rollout.pinned_memory import pinned
from diffalign.rollout.sampler import SamplingPlan
from diffalign.rollout.scoring import ScoreBook, check_unscored
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.endings import diverged
from diffalign.runtime.loop import Metrics
from diffalign.structures import Conditioning, Prompt
from diffalign.trainers.base import Trainer
from diffalign.trainers.rollout_config import AdvantageConfig, RolloutConfig


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The rollout of an iteration. conditioning: a row per group. metrics: figures to log."""

    buffer: RolloutBuffer
    route: SamplingPlan
    conditioning: Conditioning
    metrics: Metrics


class Collector:
    """Sample and score the images of an iteration; groups and statistics span all processes."""

    def __init__(
        self, trainer: Trainer, prompts: Sequence[Prompt], rewards: Mapping[str, Reward], weights: Mapping[str, float]
    ) -> None:
        args = trainer.args
        assert isinstance(args, RolloutConfig)
        self.args, self.trainer, self.prompts, self.rewards, self.weights = args, trainer, prompts, rewards, weights
        self.levels = trainer.model.levels(args.plan.num_steps, args.schedule)
        # All plans now: a moving window may reach a step that cannot be trained only after an hour.
        for plan in possible_plans(args.plan):
            if plan.trained_steps:
                plan.validate(self.levels)
        self.scored = False

    def __call__(self, iteration: int, *, means: bool = False) -> Rollout:
        """Return the rollout of this process's share. means: whether trained nodes store the means of their steps."""
        started, args, trainer = time.perf_counter(), self.args, self.trainer
        empty = self._empty(iteration, means)
        buffer, route, conditioning, prompts = empty.buffer, empty.route, empty.conditioning, empty.buffer.prompts
        group, member = self._own_samples()
        addresses = NoiseKeys(trainer.noise, "rollout", iteration, group, member, args.shared_start)
        parts = rollouts(
            trainer.model, route, conditioning, addresses, buffer, args.rollout_batch_size, args.decode_dtype
        )
        overlap = self._may_overlap()
        with ScoreBook(self.rewards, keep_images=args.save_rollouts) as book:
            with trainer.model.keeping(VAE):
                for rows, batch in parts:
                    trainer.loop.pulse(together=True)
                    # No sampling is left to overlap with the last batch.
                    book.add(batch, [prompts[g] for g in group[rows].tolist()], overlap and rows.stop < len(group))
                    trainer.loop.pulse(together=True)
            own = book.scores(group)
        self.scored = True
        buffer.settle()
        metrics = self._advantages(buffer, {name: own[name] for name in self.rewards}, group)
        extras = {f"reward/{name}": own[name].nanmean().item() for name in own if name not in self.rewards}
        if args.save_rollouts:
            self._save(buffer, torch.cat(book.images))
        if metrics["unscored"] and not buffer.x[buffer.leaves].isfinite().all():
            raise diverged(trainer.loop, "the model's images are not finite")  # no fault of the rewards
        check_unscored(metrics["unscored"], args.max_unscored, extremes(args))
        rate = args.num_groups * args.group_size / (time.perf_counter() - started)
        return dataclasses.replace(empty, metrics={**metrics, **extras, "images_per_second": rate})

    def _may_overlap(self) -> bool:
        """Whether rewards may run in a background thread while this thread samples.

        Not where one of the two changes process-wide state: sampling may choose torch's attention kernels, and rewards
        may set torch's default dtype while their networks load at first use.
        """
        chooses_kernels = self.trainer.model.plain_attention or self.args.attention.startswith("_native_")
        return self.args.overlap_rewards and self.scored and not chooses_kernels

    def _save(self, buffer: RolloutBuffer, images: Tensor) -> None:
        """Write the shares of all processes as one buffer, in place of the previous iteration's."""
        args, accelerator = self.args, self.trainer.accelerator
        folder, share, several = args.output_dir / "rollouts", accelerator.process_index, accelerator.num_processes > 1
        if share == 0:
            clear_buffer(folder)  # so that no part of another number of processes stays
        accelerator.wait_for_everyone()
        buffer.save(
            folder, images, model=args.model, seed=args.seed, share=share, gather=gather_object if several else list
        )

    def _empty(self, iteration: int, means: bool) -> Rollout:
        """Allocate the rollout of an iteration."""
        args, trainer = self.args, self.trainer
        prompts = self.prompts_of(iteration)
        plan = make_plan(args.plan, iteration, args.seed)
        shape, device = trainer.model.latent_shape(), trainer.accelerator.device
        group, member = self._own_samples()
        outside = pinned(bytes_needed(plan, len(group), shape, torch.float32, means=means), device)
        buffer = RolloutBuffer.allocate(plan, group, member, prompts, shape, device=device, means=means, pinned=outside)
        conditioning = trainer.encoded([p.text for p in prompts])
        return Rollout(buffer, SamplingPlan(plan, self.levels, trainer.guidance), conditioning, {})

    def restored(self, iteration: int, tensors: Mapping[str, Tensor]) -> Rollout:
        """Rebuild a rollout from the ``RolloutBuffer.drawn`` of all processes; each takes its own share."""
        rollout = self._empty(iteration, "mean" in tensors)
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        rollout.buffer.fill({name: tensor.chunk(world)[rank] for name, tensor in tensors.items()})
        return rollout

    def texts(self) -> list[str]:
        """Return each prompt with its metadata as JSON, for the digest of the training data."""
        return [json.dumps([p.text, p.metadata], sort_keys=True, default=str) for p in self.prompts]

    def prompts_of(self, iteration: int) -> list[Prompt]:
        """Return a prompt per group, the same on all processes; each epoch shuffles all prompts."""
        count = len(self.prompts)
        order = take(
            count,
            self.args.num_groups,
            iteration,
            lambda epoch: self.trainer.noise.permutation(count, "prompts", epoch),
        )
        return [self.prompts[i] for i in order]

    def update_index(self, iteration: int) -> Tensor:
        """Return the optimizer step of the iteration, from 0, that trains on each sample of this process: (B,) int64.

        Every ``updates_per_rollout`` consecutive samples of the whole iteration go to different steps, at random. The
        assignment does not depend on the number of processes, and gives each of them the same amount of work.
        """
        updates, total = self.args.updates_per_rollout, self.args.num_groups * self.args.group_size
        lots = self.trainer.noise.normal((total // updates, updates), "updates", iteration)
        group, member = self._own_samples()
        return lots.argsort(1).flatten()[group * self.args.group_size + member]

    def _own_samples(self) -> tuple[Tensor, Tensor]:
        """Return (group, sample index) of this process's samples: a consecutive share of them all."""
        accelerator = self.trainer.accelerator
        share = self.args.num_groups * self.args.group_size // accelerator.num_processes
        own = torch.arange(share) + share * accelerator.process_index
        return own // self.args.group_size, own % self.args.group_size

    def _advantages(self, buffer: RolloutBuffer, own: dict[str, Tensor], group: Tensor) -> Metrics:
        """Compute advantages from the rewards of all processes, store them, and return the metrics."""
        args, accelerator = self.args, self.trainer.accelerator
        names = list(own)
        table = torch.stack([own[name] for name in names] + [group.float()]).T.contiguous().to(accelerator.device)
        everything = accelerator.gather(table).cpu()
        rewards = {name: everything[:, i] for i, name in enumerate(names)}
        groups = everything[:, -1].long()
        buffer.set_rewards(own)
        if isinstance(args, AdvantageConfig):
            advantages = group_advantages(
                rewards,
                groups,
                weights=self.weights,
                std=args.advantage_std,
                aggregate=args.aggregate,
                epsilon=args.advantage_epsilon,
                clip=args.advantage_clip,
            )
            share = len(group)
            first = share * accelerator.process_index
            buffer.set_advantages(advantages[first : first + share])
        total = sum(self.weights[name] * rewards[name].double() for name in names)
        finite = total[~total.isnan()]
        return {
            "reward/mean": finite.mean().item(),
            "reward/std": finite.std(correction=0).item() if len(finite) else math.nan,
            **{f"reward/{name}": rewards[name].nanmean().item() for name in names},
            "zero_std_groups": flat_share(rewards, groups, self.weights),
            "unscored": 1 - len(finite) / len(total),
        }
