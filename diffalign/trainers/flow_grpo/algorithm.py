"""Flow-GRPO (arXiv 2505.05470): policy gradients through the stochastic steps of a flow model's sampler.

An iteration samples ``group_size`` images of each of ``num_groups`` prompts along a plan, scores them, computes
advantages relative to the group, and takes ``updates_per_rollout`` optimizer steps on the stored transitions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan
from diffalign.diffusion.steps import transition
from diffalign.losses.flow_grpo import clip_range_per_dimension, clipped_surrogate, gaussian_kl, published_kl
from diffalign.losses.grpo_guard import grpo_guard
from diffalign.losses.tempflow_grpo import noise_aware_weights
from diffalign.models import DiffusionModel
from diffalign.models.weights import REFERENCE
from diffalign.rewards.base import Reward, RewardFunction
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.record import reward_record
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.load_balancing import at_home, deal, exchange
from diffalign.rollout.sampler import micro_batches
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.loop import Metrics, MicroBatch, MiniBatch
from diffalign.runtime.provenance import digest
from diffalign.structures import Level, Prompt, StepResult
from diffalign.trainers.arguments import check_groups, dataset, evaluation_rewards, reward_table
from diffalign.trainers.base import Trainer, named_model
from diffalign.trainers.collector import Collector
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig


class FlowGRPOTrainer(Trainer):
    """Train a model on rewards with Flow-GRPO.

    model: a path, a hub id or a ``DiffusionModel``; default ``args.model``. args: the configuration.
    reward_funcs: rewards (names, functions or instances), alone, in a list, or as a mapping from reward name to weight
        where names are registered; default ``args.rewards``.
    train_dataset, eval_dataset: lists of ``Prompt``; default: the files that ``args`` names.

    ValueError or FileNotFoundError before any work where something is missing or does not fit.
    """

    name = "flow_grpo"
    args: FlowGRPOConfig

    def __init__(
        self,
        model: str | Path | DiffusionModel | None = None,
        args: FlowGRPOConfig | None = None,
        reward_funcs: str | RewardFunction | Reward | Sequence | Mapping[str, float] | None = None,
        train_dataset: Sequence[Prompt] | None = None,
        eval_dataset: Sequence[Prompt] | None = None,
    ) -> None:
        args = named_model(args or FlowGRPOConfig(), model)
        args.validate()
        given = args.rewards if reward_funcs is None else reward_funcs
        self.rewards, weights = reward_table(given, args.allow_reward_code)
        args = args if reward_funcs is None else dataclasses.replace(args, rewards=reward_record(given, self.rewards))
        prompts = dataset(train_dataset, args.train_prompts, "train_prompts")
        try_rewards(self.rewards, prompts, args.resolution)
        super().__init__(
            model,
            args,
            evaluation_rewards(args.eval_rewards, self.rewards, args.allow_reward_code),
            eval_dataset,
            keep_reference=args.kl_beta > 0,
            eval_batch_size=args.rollout_batch_size,
        )
        self.collector = Collector(self, prompts, self.rewards, weights)
        self.data_digest = digest(self.collector.texts())
        self.levels = self.collector.levels
        self.updates_per_iteration = args.updates_per_rollout
        dimensions = torch.Size(self.model.latent_shape()).numel()
        self.clip = clip_range_per_dimension(args.clip_range, args.clip_unit, dimensions)

    def check_batches(self, processes: int) -> None:
        """Raise ValueError where images or groups do not divide over the processes."""
        self.args.validate_batches(processes)
        check_groups(self.rewards, self.args.num_groups, processes)

    @property
    def eval_levels(self) -> Level:
        """Levels of ``eval_num_steps``, else of the plan."""
        return self.model.levels(self.args.eval_num_steps or self.args.plan.num_steps, self.args.schedule)

    def collect(self, iteration: int) -> Metrics:
        """Sample and score the images of an iteration."""
        vars(self).pop("rollout", None)  # free the previous buffer first
        self.rollout = self.collector(iteration, means=self.args.loss == "grpo_guard")
        if self.args.old_log_prob == "recompute":
            self._recompute(len(self.buffer.leaves))
        return self.rollout.metrics

    def collected(self) -> dict[str, Tensor]:
        """The rollout as it was sampled by the policy from the start of the iteration."""
        return self.buffer.drawn()

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore the rollout."""
        self.rollout = self.collector.restored(iteration, tensors)

    def ids(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """Prompt, group and sample index of each image of an optimizer step."""
        return self.buffer.named(minibatch.rows)

    @property
    def buffer(self) -> RolloutBuffer:
        """The iteration's rollout buffer."""
        return self.rollout.buffer

    # Update ---------------------------------------------------------------------------------------------------------

    def minibatches(self, iteration: int) -> Iterator[MiniBatch]:
        """Assign the iteration's samples to optimizer steps, and split each step into passes over (samples, step)."""
        count = len(self.buffer.leaves)
        order = self.noise.permutation(count, "minibatches", iteration, self.accelerator.process_index)
        update_of = self.collector.update_index(iteration)[order]
        weights = step_weights(self.rollout.route.plan, self.levels, self.args.step_weights)

        for update in range(self.args.updates_per_rollout):
            own = order[update_of == update]
            buffer, samples = self.rebalanced(own)
            passes = self._passes(samples)
            scale = len(own) * len(weights)
            yield MiniBatch(
                [MicroBatch(rows, weights[step] * len(rows) / scale, step, buffer) for rows, step in passes],
                own,
                {
                    "kept_fraction": len(samples) / len(own),
                    "passes_saved": float(len(self._passes(own)) - len(passes)),
                },
            )

    def rebalanced(self, samples: Tensor) -> tuple[RolloutBuffer, Tensor]:
        """Return the samples that this process trains on in an optimizer step: a buffer and rows of it.

        With ``filter_zero_advantage``, samples without an advantage are left out, and the others are spread evenly over
        the processes; the buffer holds those of other processes too. The loss stays the mean over all samples: those
        without an advantage have neither loss nor gradient, so gradients agree up to rounding. The KL has a gradient on
        every sample, so none is left out where ``kl_beta`` is not 0.

        Args:
            samples: (n,), this process's samples in the step.
        """
        if not self.args.filters:
            return self.buffer, samples
        accelerator, own = self.accelerator, len(samples)
        trained = self.buffer.advantage[self.buffer.leaves[samples]] != 0
        assigned = deal(accelerator.gather(trained.long()).view(-1, own).cpu() > 0)
        rank = accelerator.process_index
        if at_home(assigned, own):
            return self.buffer, samples[assigned[rank] - rank * own]
        move = partial(exchange, dealt=assigned, rank=rank, device=accelerator.device)
        return self.buffer.moved(samples, move), torch.arange(assigned.shape[1])

    def _passes(self, samples: Tensor) -> list[tuple[Tensor, int]]:
        parts = [samples[rows] for rows in micro_batches(len(samples), self.args.train_batch_size)]
        return [(part, step) for part in parts for step in self.rollout.route.plan.trained_steps]

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one stored step of some samples, and metrics."""
        args, buffer, step = self.args, micro.data, micro.tag

        # The reference first: its activations are freed before the policy's graph is built.
        reference = self._reference_mean(buffer, micro.rows, step) if args.kl_beta > 0 else None
        result, nodes = self._replay(buffer, micro.rows, step)
        old, advantage = buffer.log_prob[nodes], buffer.advantage[nodes]

        if args.loss == "grpo_guard":
            level, next_level = self.levels[step], self.levels[step + 1]
            loss, metrics = grpo_guard(
                result.log_prob,
                old,
                result.mean,
                buffer.means(nodes),
                result.std,
                advantage,
                self.clip,
                level,
                next_level,
            )
        else:
            loss, metrics = clipped_surrogate(result.log_prob, old, advantage, self.clip)
        loss = loss.mean()

        if reference is not None:
            kl = self._kl(result, reference, step).mean()
            loss, metrics["kl"] = loss + args.kl_beta * kl, kl.detach()
        return loss, metrics

    def _replay(self, buffer: RolloutBuffer, samples: Tensor, step: int) -> tuple[StepResult, Tensor]:
        """Replay the stored transition of ``step`` under the current weights; return it and the nodes it ends in."""
        nodes = buffer.nodes(samples, step + 1)
        x, x_next = buffer.latents(buffer.parent[nodes]), buffer.latents(nodes)
        conditioning = self.rollout.conditioning[buffer.group[nodes]]
        return self.rollout.route.replay(self.model, step, x, conditioning, x_next), nodes

    @torch.no_grad()
    def _reference_mean(self, buffer: RolloutBuffer, samples: Tensor, step: int) -> Tensor:
        with self.model.using(REFERENCE):
            return self._replay(buffer, samples, step)[0].mean

    def _kl(self, result: StepResult, reference: Tensor, step: int) -> Tensor:
        if self.args.kl_kind == "published":
            solver = self.rollout.route.plan.rows[step].solver
            return published_kl(result.mean, reference, result.std, self.levels[step], self.levels[step + 1], solver)
        return gaussian_kl(result.mean, reference, result.std)

    @torch.no_grad()
    def _recompute(self, count: int) -> None:
        for samples, step in self._passes(torch.arange(count)):
            result, nodes = self._replay(self.buffer, samples, step)
            self.buffer.log_prob[nodes] = result.log_prob
            self.buffer.put_means(nodes, result.mean)
        self.buffer.settle()

    # Checks ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_on_policy(self) -> None:
        """Replay stored steps at unchanged weights: no log-ratio may exceed a tenth of the clip range."""
        samples = torch.arange(min(self.args.train_batch_size, len(self.buffer.leaves)))
        drift = {}
        for step in self.rollout.route.plan.trained_steps:
            result, nodes = self._replay(self.buffer, samples, step)
            drift[step] = (result.log_prob - self.buffer.log_prob[nodes]).abs().max().item()
        if max(drift.values()) > self.clip / 10:
            table = ", ".join(f"step {step}: {value:.2e}" for step, value in drift.items())
            raise CannotTrain(
                f"replayed log-probs drift by more than a tenth of the clip range {self.clip:.2e} ({table}): set "
                "old_log_prob: recompute, or make train_batch_size equal to rollout_batch_size and train in float32"
                + extremes(self.args)
            )

    def probe(self) -> list[Tensor]:
        """Log-probs of the first trained step."""
        samples = torch.arange(min(self.args.train_batch_size, len(self.buffer.leaves)))
        return [self._replay(self.buffer, samples, self.rollout.route.plan.trained_steps[0])[0].log_prob]


def step_weights(plan: Plan, levels: Level, kind: str) -> dict[int, float]:
    """Return the loss weight of each trained step: the weight of its plan row, times TempFlow's if chosen."""
    steps = plan.trained_steps
    rows = [plan.rows[step] for step in steps]
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float64)
    if kind == "tempflow":
        moves = [
            transition(r.solver, levels[s], levels[s + 1], r.noise_level) for s, r in zip(steps, rows, strict=True)
        ]
        weights = weights * noise_aware_weights(torch.stack([move.std for move in moves]))
    return dict(zip(steps, weights.tolist(), strict=True))
