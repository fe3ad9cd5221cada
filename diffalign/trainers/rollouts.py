"""Rollouts for a trainer: prompts, images along a plan, rewards and advantages, in one buffer per iteration."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.config import option
from diffalign.data.order import take
from diffalign.diffusion.plan import PlanConfig, make_plan
from diffalign.models.offload import VAE
from diffalign.rewards.base import Reward
from diffalign.rewards.settings import RewardConfig
from diffalign.rollout.advantages import flat_share, group_advantages
from diffalign.rollout.buffer import RolloutBuffer, bytes_needed, clear_buffer
from diffalign.rollout.collect import Addresses, rollouts
from diffalign.rollout.sampler import Route
from diffalign.rollout.scoring import ScoreBook, check_unscored
from diffalign.rollout.storage import pinned
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.endings import diverged
from diffalign.runtime.loop import Metrics
from diffalign.structures import Conditioning, Prompt
from diffalign.trainers.base import Trainer
from diffalign.trainers.settings import TrainerConfig


@dataclasses.dataclass(kw_only=True)
class RolloutConfig(TrainerConfig):
    """What a trainer that collects rollouts can be told about them."""

    train_prompts: Path | None = option(None, ".txt or .jsonl of training prompts")
    rewards: dict[str, float | RewardConfig] = option(
        {}, "reward names and their weights, or {weight, reward, options}"
    )
    plan: PlanConfig = option(PlanConfig(), "what each step of a rollout does")
    eval_num_steps: int | None = option(None, "ODE steps of the evaluation; default: plan.num_steps", ge=1, le=10_000)
    num_groups: int = option(16, "prompts per iteration, over all processes", le=1_000_000)
    group_size: int = option(16, "images per prompt", le=1_000_000)
    shared_start: bool = option(True, "images of a group start from the same noise")
    rollout_batch_size: int = option(64, "images per forward pass while sampling")
    decode_precision: Literal["no", "bf16"] = option("no", "the VAE's while sampling; evaluations decode in float32")
    updates_per_rollout: int = option(1, "optimizer steps per iteration, each on its share of the images")
    advantage_std: Literal["group", "global"] = option("group", "deviation that advantages are divided by")
    advantage_epsilon: float = option(1e-4, "added to that deviation", ge=0)
    advantage_clip: float = option(5.0, "bound on advantages; .inf: none", gt=0, infinite=True)
    aggregate: Literal["rewards", "advantages"] = option("rewards", "what is summed over several rewards")
    max_unscored: float = option(0.2, "largest share of an iteration's images that rewards may fail on")
    overlap_rewards: bool = option(
        True, "score images while the next ones are sampled, but in the first iteration, and in bf16 on a CPU"
    )
    save_rollouts: bool = option(False, "keep the last iteration's images, latents and rewards in rollouts/")

    def __post_init__(self) -> None:
        """Paths may be given as text."""
        super().__post_init__()
        self.train_prompts = self.train_prompts and Path(self.train_prompts)

    @property
    def decode_dtype(self) -> torch.dtype:
        """What the VAE computes in while sampling."""
        return torch.bfloat16 if self.decode_precision == "bf16" else torch.float32

    def validate(self) -> None:
        """ValueError, with what to write instead, for what cannot train; reads no file."""
        super().validate()
        if self.group_size < 2:
            raise ValueError(
                f"group_size {self.group_size}: a lone image has no group to be better than; use 4 or more"
            )
        for name in ("num_groups", "rollout_batch_size", "updates_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"max_unscored is a share, in [0, 1], got {self.max_unscored}")
        self.validate_batches(1)
        make_plan(self.plan, 0, self.seed)

    def validate_batches(self, processes: int) -> None:
        """ValueError where images do not divide evenly over processes and updates."""
        images, parts = self.num_groups * self.group_size, processes * self.updates_per_rollout
        if images % parts:
            raise ValueError(
                f"num_groups * group_size = {images} images do not divide by {processes} process(es) times "
                f"updates_per_rollout = {self.updates_per_rollout}: make the product a multiple of {parts}"
            )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """An iteration's images. conditioning: a row per group. metrics: what to log of it."""

    buffer: RolloutBuffer
    route: Route
    conditioning: Conditioning
    metrics: Metrics


class Collector:
    """Samples and scores the images of an iteration; groups and statistics span all processes."""

    def __init__(
        self, trainer: Trainer, prompts: Sequence[Prompt], rewards: Mapping[str, Reward], weights: Mapping[str, float]
    ) -> None:
        args = trainer.args
        assert isinstance(args, RolloutConfig)
        self.args, self.trainer, self.prompts, self.rewards, self.weights = args, trainer, prompts, rewards, weights
        self.levels = trainer.model.levels(args.plan.num_steps, args.schedule)
        plan = make_plan(args.plan, 0, args.seed)
        if plan.trained_steps:
            plan.validate(self.levels)
        self.scored = False

    def __call__(self, iteration: int, *, means: bool = False) -> Rollout:
        """A buffer of this process's share. means: whether the trained nodes keep the means they were drawn around."""
        begun, args, trainer = time.perf_counter(), self.args, self.trainer
        empty = self._empty(iteration, means)
        buffer, route, conditioning, prompts = empty.buffer, empty.route, empty.conditioning, empty.buffer.prompts
        group, member = self._own_samples()
        addresses = Addresses(trainer.noise, "rollout", iteration, group, member, args.shared_start)
        parts = rollouts(
            trainer.model, route, conditioning, addresses, buffer, args.rollout_batch_size, args.decode_dtype
        )
        overlap = self._may_overlap()
        with ScoreBook(self.rewards, keep_images=args.save_rollouts) as book:
            with trainer.model.keeping(VAE):
                for rows, batch in parts:
                    trainer.loop.pulse(together=True)
                    # Beside the last one there is nothing to do.
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
        rate = args.num_groups * args.group_size / (time.perf_counter() - begun)
        return dataclasses.replace(empty, metrics={**metrics, **extras, "images_per_second": rate})

    def _may_overlap(self) -> bool:
        """Whether rewards may be asked in another thread while this one samples.

        Not where one of them changes what is the process's: sampling, which kernels torch's attention may use, where it
        is told to; rewards, torch's default dtype, while their networks load at the first use.
        """
        chooses_kernels = self.trainer.model.plain_attention or self.args.attention.startswith("_native_")
        return self.args.overlap_rewards and self.scored and not chooses_kernels

    def _save(self, buffer: RolloutBuffer, images: Tensor) -> None:
        """Writes the shares of all processes as one buffer, in place of the last iteration's."""
        args, accelerator = self.args, self.trainer.accelerator
        folder, share, several = args.output_dir / "rollouts", accelerator.process_index, accelerator.num_processes > 1
        if share == 0:
            clear_buffer(folder)  # so that no part of another number of processes stays
        accelerator.wait_for_everyone()
        buffer.save(
            folder, images, model=args.model, seed=args.seed, share=share, gather=gather_object if several else list
        )

    def _empty(self, iteration: int, means: bool) -> Rollout:
        """The rollout of an iteration before anything is drawn."""
        args, trainer = self.args, self.trainer
        prompts = self.prompts_of(iteration)
        plan = make_plan(args.plan, iteration, args.seed)
        shape, device = trainer.model.latent_shape(), trainer.accelerator.device
        group, member = self._own_samples()
        outside = pinned(bytes_needed(plan, len(group), shape, torch.float32, means=means), device)
        buffer = RolloutBuffer.allocate(plan, group, member, prompts, shape, device=device, means=means, pinned=outside)
        conditioning = trainer.encoded([p.text for p in prompts])
        return Rollout(buffer, Route(plan, self.levels, trainer.guidance), conditioning, {})

    def restored(self, iteration: int, tensors: Mapping[str, Tensor]) -> Rollout:
        """The rollout whose ``RolloutBuffer.drawn`` of all processes is given; each takes its own share."""
        rollout = self._empty(iteration, "mean" in tensors)
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        rollout.buffer.fill({name: tensor.chunk(world)[rank] for name, tensor in tensors.items()})
        return rollout

    def texts(self) -> list[str]:
        """What the prompts are, with all that rewards are told of them."""
        return [json.dumps([p.text, p.metadata], sort_keys=True, default=str) for p in self.prompts]

    def prompts_of(self, iteration: int) -> list[Prompt]:
        """A prompt per group, the same on all processes; each epoch goes through all prompts in a new order."""
        count = len(self.prompts)
        order = take(
            count,
            self.args.num_groups,
            iteration,
            lambda epoch: self.trainer.noise.permutation(count, "prompts", epoch),
        )
        return [self.prompts[i] for i in order]

    def dealt(self, iteration: int) -> Tensor:
        """(B,): the update, from 0, that learns from each sample of this process.

        Of every ``updates_per_rollout`` consecutive samples of the whole iteration each update gets one, at random:
        the same ones however many processes there are, of which each has equally much to do.
        """
        updates, total = self.args.updates_per_rollout, self.args.num_groups * self.args.group_size
        lots = self.trainer.noise.normal((total // updates, updates), "updates", iteration)
        group, member = self._own_samples()
        return lots.argsort(1).flatten()[group * self.args.group_size + member]

    def _own_samples(self) -> tuple[Tensor, Tensor]:
        """(group, index within the group) of the samples of this process: a consecutive share of them all."""
        accelerator = self.trainer.accelerator
        share = self.args.num_groups * self.args.group_size // accelerator.num_processes
        own = torch.arange(share) + share * accelerator.process_index
        return own // self.args.group_size, own % self.args.group_size

    def _advantages(self, buffer: RolloutBuffer, own: dict[str, Tensor], group: Tensor) -> Metrics:
        """Advantages from the rewards of all processes, into the buffer; the figures of the iteration."""
        args, accelerator = self.args, self.trainer.accelerator
        names = list(own)
        table = torch.stack([own[name] for name in names] + [group.float()]).T.contiguous().to(accelerator.device)
        everything = accelerator.gather(table).cpu()
        rewards = {name: everything[:, i] for i, name in enumerate(names)}
        groups = everything[:, -1].long()
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
        buffer.set_rewards(own)
        buffer.set_advantages(advantages[first : first + share])
        total = sum(self.weights[name] * rewards[name] for name in names)
        finite = total[~total.isnan()]
        return {
            "reward/mean": finite.mean().item(),
            "reward/std": finite.std(correction=0).item(),
            **{f"reward/{name}": rewards[name].nanmean().item() for name in names},
            "flat_groups": flat_share(rewards, groups, self.weights),
            "unscored": 1 - len(finite) / len(total),
        }
