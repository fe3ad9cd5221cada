"""Collect rollouts: sample images along a plan, score them, and turn rewards into advantages, in one buffer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.data.epoch_order import take
from diffalign.data.images import portable_metadata
from diffalign.diffusion.plan import Plan, make_plan, possible_plans
from diffalign.models.editing import check_sources
from diffalign.models.offload import VAE
from diffalign.models.sampling_cache import cached, check_supported, first_block, taylorseer
from diffalign.rewards.base import Reward, wants_latents
from diffalign.rollout.advantages import ADVANTAGE_RULES, flat_share, group_advantages, weighted_total
from diffalign.rollout.anchored import allocate_anchored, anchored_latents, anchored_trees
from diffalign.rollout.buffer import RolloutBuffer, bytes_needed, clear_buffer, stored_steps
from diffalign.rollout.config import AdvantageConfig, RolloutConfig
from diffalign.rollout.generate import NoiseKeys, decode, rollout_latents
from diffalign.rollout.pinned_memory import pinned
from diffalign.rollout.sampler import SamplingPlan
from diffalign.rollout.scoring import ScoreBook, check_unscored
from diffalign.rollout.tree import trees_per_group
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.interfaces import IterationBatch, Metrics
from diffalign.runtime.provenance import digest
from diffalign.runtime.run import Run
from diffalign.structures import Conditioning, Prompt


def sampling_cache(config: RolloutConfig) -> object:
    """Return diffusers' configuration of the rollout's cache; None for none."""
    cache = config.rollout_cache
    if cache.kind == "first_block":
        return first_block(cache.threshold)
    return taylorseer(cache.interval, cache.warmup, cache.order) if cache.kind == "taylorseer" else None


@dataclass
class Rollout(IterationBatch):
    """This process's share of a rollout.

    Attributes:
        buffer: Samples, log-probs, rewards and advantages.
        plan: How the samples were made.
        conditioning: A row per group.
        scores: Rewards that are still being computed.
        started: Time at which the iteration began, its prompts not yet encoded.
    """

    buffer: RolloutBuffer
    plan: SamplingPlan
    conditioning: Conditioning
    scores: ScoreBook | None = None
    started: float = field(default_factory=time.perf_counter)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rollout as it was sampled by the policy from the start of the iteration."""
        return self.buffer.drawn()

    def ids(self, rows: Tensor) -> list[dict[str, object]]:
        """Return prompt, group and sample index of samples."""
        return self.buffer.named(rows)


class Collector:
    """Sample and score the images of an iteration; groups and statistics span all processes.

    Args:
        run: The training.
        prompts: Training prompts.
        rewards: Rewards by name.
        weights: Weight of each reward.
        leaves_only: Whether to store final latents only, whatever the plan.

    Attributes:
        decodes: Whether images are decoded: a reward needs them, or rollouts are saved.
    """

    def __init__(
        self,
        run: Run[RolloutConfig],
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        leaves_only: bool = False,
    ) -> None:
        self.run, self.config, self.model = run, run.config, run.model
        self.leaves_only = leaves_only
        if leaves_only and self.config.plan.leaves > 1:
            raise ValueError(
                f"plan.preset {self.config.plan.preset!r} samples trees, and this trainer reads chains only"
            )
        check_sources(self.model, prompts)
        self.prompts, self.rewards, self.weights = prompts, rewards, weights
        self.decodes = run.config.save_rollouts or not all(map(wants_latents, rewards.values()))
        self.levels = run.model.levels(self.config.plan.num_steps, self.config.schedule)
        # All plans now: a moving window may reach a step that cannot be trained only after an hour.
        for plan in possible_plans(self.config.plan, trees=True):
            if plan.trained_steps:
                plan.validate(self.levels)
        self._scored = False
        self.cache = sampling_cache(self.config)
        if self.cache is not None:
            check_supported(run.model.raw_denoiser)

    def sample(self, iteration: int, *, means: bool = False) -> Rollout:
        """Sample this process's images; rewards may score them in the background meanwhile.

        Args:
            iteration: Index of the iteration.
            means: Whether trained nodes store the means of their steps.
        """
        started, config = time.perf_counter(), self.config
        rollout = self._allocate(iteration, means)
        rollout.started = started
        buffer, (group, sample) = rollout.buffer, self._own_trees(rollout.plan.plan)
        keys = NoiseKeys(self.run.rng, "rollout", iteration, group, sample, config.shared_start)
        parts = (anchored_latents if rollout.plan.plan.anchors else rollout_latents)(
            self.model, rollout.plan, rollout.conditioning, keys, buffer, config.rollout_batch_size
        )
        overlap, leaf_groups = self._may_overlap(), buffer.group[buffer.leaves].tolist()

        book = rollout.scores = ScoreBook(self.rewards, keep_images=config.save_rollouts)
        try:
            with self.model.keeping(VAE), self._caching(rollout):
                for rows, latents in parts:
                    images = decode(self.model, latents, config.decode_dtype) if self.decodes else None
                    self.run.heartbeat(collective=True)
                    # No sampling is left to overlap with the last batch.
                    in_background = overlap and rows.stop < len(leaf_groups)
                    book.add(images, [buffer.prompts[g] for g in leaf_groups[rows]], in_background, latents)
                    self.run.heartbeat(collective=True)
        except BaseException:
            book.close()
            raise
        return rollout

    @contextmanager
    def _caching(self, rollout: Rollout) -> Iterator[None]:
        """Reuse activations between sampling steps if the configuration says so; log the computed share."""
        if self.cache is None:
            yield
            return
        with cached(self.model.raw_denoiser, self.cache) as count:
            yield
        seen = self.run.gather(torch.tensor([[count.computed, count.calls]])).sum(0)
        rollout.metrics["cache/computed_share"] = (seen[0] / seen[1]).item()

    def score(self, rollout: Rollout) -> None:
        """Wait for the rewards of this process's images, and store them in the buffer."""
        assert rollout.scores is not None
        buffer = rollout.buffer
        with rollout.scores as book:
            own = book.scores(buffer.group[buffer.leaves])
        self._scored = True
        buffer.settle()
        buffer.set_rewards({name: own[name] for name in self.rewards})
        extras = {f"reward/{name}": own[name].nanmean().item() for name in own if name not in self.rewards}
        rollout.metrics.update(extras)

    def advantage(self, rollout: Rollout) -> None:
        """Compute advantages from the rewards of all processes, store them, and log statistics of the rewards.

        Raises:
            NotFinite: The model's images are not finite.
            ValueError: Rewards failed on a larger share of the images than ``max_unscored``.
        """
        config, buffer, extras = self.config, rollout.buffer, rollout.metrics
        metrics = self._advantages(buffer)
        if config.save_rollouts:
            assert rollout.scores is not None
            self._save(buffer, torch.cat(rollout.scores.images))
        rollout.scores = None

        if metrics["unscored"] and not buffer.x[buffer.leaves].isfinite().all():
            raise self.run.diverged("the model's images are not finite")  # no fault of the rewards
        check_unscored(metrics["unscored"], config.max_unscored, extremes(config))
        rate = config.num_groups * config.group_size / (time.perf_counter() - rollout.started)
        rollout.metrics = {**metrics, **extras, "images_per_second": rate}

    def _may_overlap(self) -> bool:
        """Return whether rewards may run in a background thread while this thread samples.

        They may not if one of the two changes process-wide state: sampling may choose torch's attention kernels, and
        rewards may set torch's default dtype while their networks load at first use.
        """
        chooses_kernels = self.model.plain_attention or self.config.attention.startswith("_native_")
        return self.config.overlap_rewards and self._scored and not chooses_kernels

    def _save(self, buffer: RolloutBuffer, images: Tensor) -> None:
        """Write the shares of all processes as one buffer, in place of the previous iteration's."""
        config, run = self.config, self.run
        folder = config.output_dir / "rollouts"
        if run.rank == 0:
            clear_buffer(folder)  # parts of another number of processes would stay
        run.accelerator.wait_for_everyone()
        buffer.save(folder, images, model=config.model, seed=config.seed, share=run.rank, gather=run.gather_objects)

    def _allocate(self, iteration: int, means: bool) -> Rollout:
        """Allocate the rollout of an iteration."""
        config, model = self.config, self.model
        prompts = self.prompts_of(iteration)
        plan = make_plan(config.plan, iteration, config.seed, trees=True)
        shape, device = model.latent_shape(), self.run.accelerator.device
        group, sample = self._own_trees(plan)
        steps = (len(plan),) if self.leaves_only else stored_steps(plan.tree(0))
        size = bytes_needed(plan.tree(0), len(group), shape, torch.float32, means=means, steps=steps)
        outside = pinned(size, device)
        if plan.anchors:
            buffer = allocate_anchored(plan, group, sample, prompts, shape, device=device, means=means, pinned=outside)
        else:
            buffer = RolloutBuffer.allocate(
                plan, group, sample, prompts, shape, device=device, means=means, steps=steps, pinned=outside
            )
        conditioning = self.run.prompts([p.input for p in prompts])
        return Rollout(buffer, SamplingPlan(plan, self.levels, self.run.guidance), conditioning)

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> Rollout:
        """Rebuild a rollout from the ``Rollout.state_dict`` of all processes; each takes its own share."""
        rollout = self._allocate(iteration, "mean" in tensors)
        rollout.buffer.fill({name: tensor.chunk(self.run.world)[self.run.rank] for name, tensor in tensors.items()})
        rollout.metrics = metrics
        return rollout

    def digests(self) -> tuple[str, str]:
        """Return the digest of texts and metadata of the prompts, and the one of version 0.1, with paths of images."""
        own = ([p.text, portable_metadata(p)] for p in self.prompts)
        old = ([p.text, p.metadata] for p in self.prompts)
        one, other = (digest(json.dumps(row, sort_keys=True, default=str) for row in rows) for rows in (own, old))
        return one, other

    def prompts_of(self, iteration: int) -> list[Prompt]:
        """Return a prompt per group, the same on all processes; each epoch shuffles all prompts."""
        count, rng = len(self.prompts), self.run.rng
        order = take(count, self.config.num_groups, iteration, lambda epoch: rng.permutation(count, "prompts", epoch))
        return [self.prompts[i] for i in order]

    def update_index(self, iteration: int, plan: Plan) -> Tensor:
        """Return the optimizer step of the iteration, from 0, that trains on each tree of this process: (B,) int64.

        Every ``updates_per_rollout`` consecutive trees (samples, if the plan does not branch) of the whole iteration go
        to different steps, at random. The assignment does not depend on the number of processes, and gives each of them
        the same amount of work.
        """
        updates, per_group = self.config.updates_per_rollout, trees_per_group(plan, self.config.group_size)
        lots = self.run.rng.normal((self.config.num_groups * per_group // updates, updates), "updates", iteration)
        group, sample = self._own_trees(plan)
        return lots.argsort(1).flatten()[group * per_group + sample]

    def _own_trees(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return (group, index in the group) of this process's trees: a consecutive share of them all.

        With anchors it is a share of the groups, ordered by anchor.
        """
        if plan.anchors:
            return anchored_trees(plan, self.run.share(self.config.num_groups), self.config.group_size)
        per_group = trees_per_group(plan, self.config.group_size)
        own = torch.tensor(self.run.share(self.config.num_groups * per_group))
        return own // per_group, own % per_group

    def _advantages(self, buffer: RolloutBuffer) -> Metrics:
        """Store advantages from the rewards of all processes; return statistics of the rewards."""
        config, group = self.config, buffer.group[buffer.leaves]
        own = {name: buffer.rewards[name][buffer.leaves] for name in self.rewards}
        table = self.run.gather(torch.stack([*own.values(), group.to(torch.float32)]).T.contiguous())
        rewards = {name: table[:, i] for i, name in enumerate(own)}
        groups = table[:, -1].long()

        if isinstance(config, AdvantageConfig):
            advantages = group_advantages(
                rewards,
                groups,
                weights=self.weights,
                std=config.normalisation,
                aggregate=config.aggregate,
                epsilon=config.advantage_epsilon,
                clip=config.advantage_clip,
                diversity=rewards[config.advantage_diversity] if config.advantage_diversity else None,
            )
            share = self.run.share(len(advantages))
            total = weighted_total(own, self.weights)
            buffer.set_advantages(advantages[share.start : share.stop], config.rule, rewards=total)
            if ADVANTAGE_RULES[config.rule].of == "rewards":
                buffer.advantage.clamp_(-config.advantage_clip, config.advantage_clip)

        total = weighted_total({name: values.double() for name, values in rewards.items()}, self.weights)
        finite = total[~total.isnan()]
        return {
            "reward/mean": finite.mean().item(),
            "reward/std": finite.std(correction=0).item() if len(finite) else math.nan,
            **{f"reward/{name}": values.nanmean().item() for name, values in rewards.items()},
            "zero_std_groups": flat_share(rewards, groups, self.weights),
            "unscored": 1 - len(finite) / len(total),
        }
