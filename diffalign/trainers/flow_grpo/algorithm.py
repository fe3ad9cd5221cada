"""Flow-GRPO (arXiv 2505.05470): policy gradients through the stochastic steps of a flow model's sampler.

An iteration samples ``group_size`` images of each of ``num_groups`` prompts along a plan, scores them, computes
advantages relative to the group, and takes ``updates_per_rollout`` optimizer steps on the stored transitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan
from diffalign.diffusion.steps import transition
from diffalign.losses.flow_grpo import clip_range_per_dimension, gaussian_kl, published_kl
from diffalign.losses.policy import PolicyStep
from diffalign.losses.registry import get_objective
from diffalign.losses.tempflow_grpo import noise_aware_weights
from diffalign.models.weights import REFERENCE
from diffalign.rewards.support.probe import try_rewards
from diffalign.rollout.collector import Collector, Rollout
from diffalign.rollout.load_balancing import at_home, deal, exchange
from diffalign.rollout.sampler import micro_batches
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.interfaces import Metrics, MicroBatch, MiniBatch
from diffalign.runtime.provenance import digest
from diffalign.runtime.run import Run
from diffalign.structures import Level, StepResult
from diffalign.trainers.algorithm import Algorithm
from diffalign.trainers.base import Trainer
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig
from diffalign.trainers.flow_grpo.cost import COST
from diffalign.trainers.inputs import Inputs, check_groups, dataset, evaluation_rewards, read_rewards
from diffalign.trainers.registry import register_algorithm

TRIAL = {
    "num_groups": 2,
    "group_size": 4,
    "rollout_batch_size": 8,
    "train_batch_size": 8,
    "train_prompts": "{assets}/prompts/shapes_train.jsonl",
    # this reward differs between any two images, so advantages are non-zero
    "rewards": {"jpeg_compressibility": 1.0},
    "plan": {"preset": "first_steps", "num_steps": 4, "window_size": 2},
}


@register_algorithm("flow_grpo", config=FlowGRPOConfig, cost=COST, trial=TRIAL)
class FlowGRPO(Algorithm[FlowGRPOConfig, Rollout]):
    """Policy gradients on the stored stochastic steps of rollouts, with advantages relative to the group."""

    @classmethod
    def read_inputs(cls, config: FlowGRPOConfig, reward_funcs: Any, train_dataset: Any) -> Inputs[FlowGRPOConfig]:
        """Validate the configuration, and read rewards and prompts."""
        config.validate()
        config, rewards, weights = read_rewards(config, reward_funcs)
        prompts = dataset(train_dataset, config.train_prompts, "train_prompts")
        try_rewards(rewards, prompts, config.resolution)
        judges = evaluation_rewards(config.eval_rewards, rewards, config.allow_reward_code)
        return Inputs(config, prompts, rewards, weights, judges)

    @classmethod
    def check_processes(cls, inputs: Inputs[FlowGRPOConfig], processes: int) -> None:
        """Raise ValueError where images or groups do not divide over the processes."""
        inputs.config.validate_batches(processes)
        check_groups(inputs.rewards, inputs.config.num_groups, processes)

    @classmethod
    def keeps_reference(cls, config: FlowGRPOConfig) -> bool:
        """Return whether a KL to the base model is part of the loss."""
        return config.kl_beta > 0

    def __init__(self, run: Run[FlowGRPOConfig], inputs: Inputs[FlowGRPOConfig]) -> None:
        super().__init__(run, inputs)
        config = run.config
        self.collector = Collector(run, inputs.data, inputs.rewards, inputs.weights)
        self.data_digest = digest(self.collector.texts())
        self.levels = self.collector.levels
        self.updates_per_iteration = config.updates_per_rollout
        self.objective = get_objective(config.loss)
        dimensions = torch.Size(self.model.latent_shape()).numel()
        self.clip = clip_range_per_dimension(config.clip_range, config.clip_unit, dimensions)

    # An iteration ---------------------------------------------------------------------------------------------------

    def sample(self, iteration: int) -> Rollout:
        """Sample the images of an iteration."""
        return self.collector.sample(iteration, means=self.objective.means)

    def score(self, batch: Rollout) -> None:
        """Score the images."""
        self.collector.score(batch)

    def advantage(self, batch: Rollout) -> None:
        """Compute advantages within groups, and log-probs at training shapes with ``old_log_prob: recompute``."""
        self.collector.advantage(batch)
        if self.config.old_log_prob == "recompute":
            self._recompute(batch)

    @torch.no_grad()
    def _recompute(self, batch: Rollout) -> None:
        buffer = batch.buffer
        for samples, step in self._passes(batch, torch.arange(len(buffer.leaves))):
            result, nodes = self._replay(batch, samples, step)
            buffer.log_prob[nodes] = result.log_prob
            buffer.put_means(nodes, result.mean)
        buffer.settle()

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> Rollout:
        """Rebuild the rollout."""
        return self.collector.restored(iteration, tensors, metrics)

    # Update ---------------------------------------------------------------------------------------------------------

    def minibatches(self, batch: Rollout, iteration: int) -> Iterator[MiniBatch]:
        """Assign the iteration's samples to optimizer steps, and split each step into passes over (samples, step)."""
        count = len(batch.buffer.leaves)
        order = self.run.rng.permutation(count, "minibatches", iteration, self.run.rank)
        update_of = self.collector.update_index(iteration)[order]
        weights = step_weights(batch.plan.plan, self.levels, self.config.step_weights)

        for update in range(self.config.updates_per_rollout):
            own = order[update_of == update]
            rollout, samples = self.rebalanced(batch, own)
            passes = self._passes(batch, samples)
            scale = len(own) * len(weights)
            yield MiniBatch(
                [MicroBatch(rows, weights[step] * len(rows) / scale, rollout, step) for rows, step in passes],
                own,
                {
                    "kept_fraction": len(samples) / len(own),
                    "passes_saved": float(len(self._passes(batch, own)) - len(passes)),
                },
            )

    def rebalanced(self, rollout: Rollout, samples: Tensor) -> tuple[Rollout, Tensor]:
        """Return the samples that this process trains on in an optimizer step: a rollout and rows of it.

        With ``filter_zero_advantage``, samples without an advantage are left out, and the others are spread evenly over
        the processes; the rollout holds those of other processes too. The loss stays the mean over all samples: those
        without an advantage have neither loss nor gradient, so gradients agree up to rounding. The KL has a gradient on
        every sample, so none is left out where ``kl_beta`` is not 0.

        Args:
            rollout: This process's rollout.
            samples: (n,), this process's samples in the step.
        """
        if not self.config.filters:
            return rollout, samples
        buffer, rank, own = rollout.buffer, self.run.rank, len(samples)
        trained = buffer.advantage[buffer.leaves[samples]] != 0
        assigned = deal(self.run.gather(trained.long()).view(-1, own) > 0)
        if at_home(assigned, own):
            return rollout, samples[assigned[rank] - rank * own]
        move = partial(exchange, dealt=assigned, rank=rank, device=self.run.accelerator.device)
        return replace(rollout, buffer=buffer.moved(samples, move)), torch.arange(assigned.shape[1])

    def _passes(self, batch: Rollout, samples: Tensor) -> Sequence[tuple[Tensor, int]]:
        parts = [samples[rows] for rows in micro_batches(len(samples), self.config.train_batch_size)]
        return [(part, step) for part in parts for step in batch.plan.plan.trained_steps]

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one stored step of some samples, and metrics."""
        rollout, step, kl_beta = micro.data, micro.tag, self.config.kl_beta
        buffer = rollout.buffer

        # The reference first: its activations are freed before the policy's graph is built.
        reference = self._reference_mean(rollout, micro.rows, step) if kl_beta > 0 else None
        result, nodes = self._replay(rollout, micro.rows, step)
        assert result.log_prob is not None
        replayed = PolicyStep(
            result.log_prob,
            buffer.log_prob[nodes],
            buffer.advantage[nodes],
            result.mean,
            result.std,
            self.levels[step],
            self.levels[step + 1],
            buffer.means(nodes) if self.objective.means else None,
        )
        losses, metrics = self.objective.function(replayed, clip_range=self.clip)
        loss = losses.mean()

        if reference is not None:
            kl = self._kl(rollout, result, reference, step).mean()
            loss, metrics["kl"] = loss + (kl_beta * kl).to(loss.device), kl.detach()
        return loss, metrics

    def _replay(self, rollout: Rollout, samples: Tensor, step: int) -> tuple[StepResult, Tensor]:
        """Replay the stored transition of ``step`` under the current weights; return it and the nodes it ends in."""
        buffer = rollout.buffer
        nodes = buffer.nodes(samples, step + 1)
        x, x_next = buffer.latents(buffer.parent[nodes]), buffer.latents(nodes)
        conditioning = rollout.conditioning[buffer.group[nodes]]
        return rollout.plan.replay(self.model, step, x, conditioning, x_next), nodes

    @torch.no_grad()
    def _reference_mean(self, rollout: Rollout, samples: Tensor, step: int) -> Tensor:
        with self.model.using(REFERENCE):
            return self._replay(rollout, samples, step)[0].mean

    def _kl(self, rollout: Rollout, result: StepResult, reference: Tensor, step: int) -> Tensor:
        if self.config.kl_kind == "published":
            solver = rollout.plan.plan.rows[step].solver
            return published_kl(result.mean, reference, result.std, self.levels[step], self.levels[step + 1], solver)
        return gaussian_kl(result.mean, reference, result.std)

    # Checks and evaluations -----------------------------------------------------------------------------------------

    def on_first_batch(self, batch: Rollout) -> None:
        """Replay stored steps at unchanged weights: no log-ratio may exceed a tenth of the clip range."""
        buffer = batch.buffer
        samples = torch.arange(min(self.config.train_batch_size, len(buffer.leaves)))
        drift = {}
        for step in batch.plan.plan.trained_steps:
            result, nodes = self._replay(batch, samples, step)
            drift[step] = (result.log_prob - buffer.log_prob[nodes]).abs().max().item()
        if max(drift.values()) > self.clip / 10:
            table = ", ".join(f"step {step}: {value:.2e}" for step, value in drift.items())
            raise CannotTrain(
                f"replayed log-probs drift by more than a tenth of the clip range {self.clip:.2e} ({table}): set "
                "old_log_prob: recompute, or make train_batch_size equal to rollout_batch_size and train in float32"
                + extremes(self.config)
            )

    def probe(self, batch: Rollout) -> list[Tensor]:
        """Return the log-probs of the first trained step."""
        samples = torch.arange(min(self.config.train_batch_size, len(batch.buffer.leaves)))
        return [self._replay(batch, samples, batch.plan.plan.trained_steps[0])[0].log_prob]

    @property
    def num_steps(self) -> int:
        """Sampling steps of the plan."""
        return self.config.plan.num_steps


class FlowGRPOTrainer(Trainer[FlowGRPOConfig]):
    """Train a model on rewards with Flow-GRPO.

    Args:
        model: A path, a hub id or a ``DiffusionModel``; default: ``args.model``.
        args: The configuration.
        reward_funcs: Rewards (names, functions or instances), alone, in a list, or as a mapping from reward name to
            weight where names are registered; default: ``args.rewards``.
        train_dataset: A list of ``Prompt``; default: ``args.train_prompts``.
        eval_dataset: A list of ``Prompt``; default: ``args.eval_prompts``.

    Raises:
        ValueError, FileNotFoundError: Before any work, if something is missing or does not fit.
    """

    algorithm_class = FlowGRPO


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
