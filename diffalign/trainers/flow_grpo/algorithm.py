"""Flow-GRPO (arXiv 2505.05470): policy gradients through the stochastic steps of a flow model's sampler.

An iteration samples ``group_size`` images of each of ``num_groups`` prompts along a plan, scores them, computes
advantages relative to the group, and takes ``updates_per_rollout`` optimizer steps on the stored transitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan
from diffalign.diffusion.steps import transition
from diffalign.losses.flow_grpo import clip_range_per_dimension, published_kl
from diffalign.losses.policy import PolicyStep, gaussian_kl
from diffalign.losses.registry import get_objective
from diffalign.losses.tempflow_grpo import noise_aware_weights
from diffalign.losses.tree_rpo import best_path_error, reward_clip_range
from diffalign.models.weights import REFERENCE
from diffalign.rollout.advantages import weighted_total
from diffalign.rollout.collector import Rollout
from diffalign.rollout.generate import replay_steps
from diffalign.rollout.prune import best_paths, kept_nodes
from diffalign.rollout.rebalance import rebalanced
from diffalign.rollout.sampler import micro_batches
from diffalign.rollout.tree import leaves_per_tree
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.interfaces import MicroBatch, MiniBatch
from diffalign.runtime.run import Run
from diffalign.structures import Level, StepResult
from diffalign.trainers.base import Trainer
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig
from diffalign.trainers.flow_grpo.cost import COST
from diffalign.trainers.inputs import Inputs
from diffalign.trainers.registry import register_algorithm
from diffalign.trainers.rollouts import RolloutAlgorithm

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
class FlowGRPO(RolloutAlgorithm[FlowGRPOConfig]):
    """Policy gradients on the stored stochastic steps of rollouts, with advantages relative to the group."""

    collapse_remedy = "Go on from an earlier checkpoint with half the learning_rate, or with kl_beta: 0.03."

    @classmethod
    def keeps_reference(cls, config: FlowGRPOConfig) -> bool:
        """Return whether a KL to the base model is part of the loss."""
        return config.kl_beta > 0

    @classmethod
    def check_processes(cls, inputs: Inputs[FlowGRPOConfig], processes: int) -> None:
        """Raise ValueError where images, groups or the two images of a prompt do not divide over the processes."""
        super().check_processes(inputs, processes)
        config = inputs.config
        if config.num_groups % processes and config.partners:
            raise ValueError(
                f"the two images of a prompt stay on one process: make num_groups a multiple of the {processes} "
                "processes"
            )

    def __init__(self, run: Run[FlowGRPOConfig], inputs: Inputs[FlowGRPOConfig]) -> None:
        super().__init__(run, inputs)
        config = run.config
        self.levels = self.collector.levels
        self.objective = get_objective(config.loss)
        dimensions = torch.Size(self.model.latent_shape()).numel()
        if (self.objective.partners or config.best_path_weight) and not self.levels.is_flow:
            what = f"loss {config.loss!r}" if self.objective.partners else "best_path_weight"
            raise ValueError(f"{what} compares velocities of flow models, and this model is none: leave it out")
        self.clip = clip_range_per_dimension(config.clip_range, config.clip_unit, dimensions)

    # An iteration ---------------------------------------------------------------------------------------------------

    def sample(self, iteration: int) -> Rollout:
        """Sample the images of an iteration."""
        return self.collector.sample(iteration, means=self.config.means)

    def advantage(self, batch: Rollout) -> None:
        """Compute advantages within groups, and log-probs at training shapes with ``old_log_prob: recompute``."""
        super().advantage(batch)
        if self.config.old_log_prob == "recompute":
            self._recompute(batch)

    @torch.no_grad()
    def _recompute(self, batch: Rollout) -> None:
        buffer = batch.buffer
        for parts in self._passes(batch, torch.arange(trees(batch))):
            for nodes, result in zip(parts, self._replays(batch, parts), strict=True):
                buffer.log_prob[nodes] = density(result)
                buffer.put_means(nodes, result.mean)
        buffer.settle()

    # Update ---------------------------------------------------------------------------------------------------------

    def minibatches(self, batch: Rollout, iteration: int) -> Iterator[MiniBatch]:
        """Assign the iteration's trees to optimizer steps, and split each step into passes over transitions.

        A tree of a plan that does not branch is one sample. Every transition trains once, also one that leaves share.
        """
        plan = batch.plan.plan
        order = self.run.rng.permutation(trees(batch), "minibatches", iteration, self.run.rank)
        update_of = self.collector.update_index(iteration, plan)[order]

        for update in range(self.config.updates_per_rollout):
            own = order[update_of == update]
            rollout, kept = self.rebalanced(batch, own)
            passes = self._passes(rollout, kept)
            # Of chains some are left out, which have no gradient and count in the mean.
            trees_only = self.config.plan.leaves > 1
            scale = sum(len(nodes) for p in passes for nodes in p) if trees_only else len(own) * len(plan.trained_steps)
            yield MiniBatch(
                [MicroBatch(torch.cat(p), sum(self._weights(rollout, p)) / scale, rollout) for p in passes],
                leaves_of(plan, own),
                {
                    "kept_fraction": len(kept) / len(own),
                    "passes_saved": float(len(self._passes(batch, own)) - len(passes)),
                },
            )

    def rebalanced(self, rollout: Rollout, samples: Tensor) -> tuple[Rollout, Tensor]:
        """Return the samples that this process trains on in an optimizer step: a rollout and rows of it.

        With ``filter_zero_advantage``, samples without an advantage are left out, unless a KL acts on every sample: see
        ``rollout.rebalance``.

        Args:
            rollout: This process's rollout.
            samples: (n,), this process's samples in the step.
        """
        return rebalanced(self.run, rollout, samples) if self.config.filters else (rollout, samples)

    def _passes(self, rollout: Rollout, chosen: Tensor) -> list[list[Tensor]]:
        """List the rows of transitions of each pass over some trees, a tensor per step.

        Transitions from one state share its evaluation, and so a pass: ``train_batch_size`` counts states.
        """
        size, steps, kept = self.config.train_batch_size, rollout.plan.plan.trained_steps, self._kept(rollout)
        found = []
        for rows in micro_batches(len(chosen), size):
            nodes = [self._transitions(rollout, chosen[rows], step, kept) for step in steps]
            parts = [part for of_step in nodes for part in split_by_parent(of_step, rollout.buffer.parent, size)]
            together = micro_batches(len(parts), self.config.train_times_per_forward)
            found += [self._by_step(rollout, torch.cat(parts[some])) for some in together]
        return found

    def _by_step(self, rollout: Rollout, nodes: Tensor) -> list[Tensor]:
        """Split the rows of a pass by the step that they end."""
        counts = torch.unique_consecutive(rollout.buffer.step[nodes], return_counts=True)[1]
        return list(nodes.split(counts.tolist()))

    def _step(self, rollout: Rollout, nodes: Tensor) -> int:
        return int(rollout.buffer.step[nodes[0]]) - 1

    def _weights(self, rollout: Rollout, parts: list[Tensor]) -> list[float]:
        """Return the weight of each step's rows in a pass: of their step, times their number."""
        weights = step_weights(rollout.plan.plan, self.levels, self.config.step_weights)
        return [weights[self._step(rollout, nodes)] * len(nodes) for nodes in parts]

    def _kept(self, rollout: Rollout) -> Tensor | None:
        """Return which nodes width pruning keeps, (N,) bool; None without it."""
        pruning = self.config.width_pruning
        if pruning == "none":
            return None
        ratio = self.config.width_pruning_ratio
        return kept_nodes(rollout.buffer, rollout.plan.plan, pruning, self._total(rollout), ratio)

    def _total(self, rollout: Rollout) -> Tensor:
        """Return the weighted rewards of the leaves: (L,)."""
        buffer = rollout.buffer
        own = {name: values[buffer.leaves] for name, values in buffer.rewards.items()}
        return weighted_total(own, self.collector.weights)

    def _transitions(self, rollout: Rollout, chosen: Tensor, step: int, kept: Tensor | None = None) -> Tensor:
        """Return the rows of the trained nodes that end step ``step`` of some trees, tree after tree."""
        buffer = rollout.buffer
        size = len(buffer.step) // trees(rollout)
        ends = buffer.trained & (buffer.step == step + 1)
        ends = ends if kept is None else ends & kept
        rows = chosen[:, None] * size + torch.arange(size)
        return rows[ends[rows]]

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some transitions, weighted by their steps, and metrics."""
        rollout, parts = micro.data, self._by_step(micro.data, micro.rows)

        # The reference first: its activations are freed before the policy's graph is built.
        references = self._reference_means(rollout, parts) if self.config.kl_beta > 0 else [None] * len(parts)
        results = self._replays(rollout, parts)
        losses, found = [], []
        for nodes, result, reference in zip(parts, results, references, strict=True):
            step = self._step(rollout, nodes)
            replayed = self._replayed(rollout, nodes, result, step)
            values, metrics = self.objective.function(replayed, clip_range=self._clip_range(replayed))
            loss = values.mean()
            if self.config.best_path_weight > 0:
                best = self._best_path(rollout, nodes, result, step)
                loss, metrics["best_path"] = loss + self.config.best_path_weight * best.to(loss), best.detach()
            if reference is not None:
                kl = self._kl(rollout, result, reference, step).mean()
                loss, metrics["kl"] = loss + (self.config.kl_beta * kl).to(loss.device), kl.detach()
            losses.append(loss)
            found.append(metrics)

        if len(parts) == 1:
            return loss, metrics
        weights, counts = self._weights(rollout, parts), [len(nodes) for nodes in parts]
        means = {name: averaged([metrics[name] for metrics in found], counts) for name in metrics}
        return averaged(losses, weights), means

    def _replayed(self, rollout: Rollout, nodes: Tensor, result: StepResult, step: int) -> PolicyStep:
        """Return replayed transitions of one step, as an objective reads them."""
        buffer = rollout.buffer
        replayed = PolicyStep(
            density(result),
            buffer.log_prob[nodes],
            buffer.advantage[nodes],
            result.mean,
            result.std,
            self.levels[step],
            self.levels[step + 1],
            buffer.means(nodes) if self.config.means else None,
            self.config.trust_region,
        )
        if not self.objective.partners:
            return replayed
        return replace(replayed, direction=self._direction(rollout, nodes), output_scale=self._scale(rollout, step))

    def _replay(self, rollout: Rollout, nodes: Tensor) -> StepResult:
        """Replay stored transitions under the current weights."""
        return self._replays(rollout, [nodes])[0]

    def _replays(self, rollout: Rollout, parts: list[Tensor]) -> list[StepResult]:
        """Replay stored transitions of several steps in one forward pass."""
        return replay_steps(self.model, rollout.plan, rollout.conditioning, rollout.buffer, parts)

    @torch.no_grad()
    def _reference_means(self, rollout: Rollout, parts: list[Tensor]) -> list[Tensor]:
        with self.model.using(REFERENCE):
            return [result.mean for result in self._replays(rollout, parts)]

    def _clip_range(self, step: PolicyStep) -> float | Tensor:
        """Return the clip range of each transition: one number, unless it grows with the advantage."""
        if not self.config.clip_growth:
            return self.clip
        return reward_clip_range(step.advantage.to(step.log_prob), self.clip, self.config.clip_growth)

    def _best_path(self, rollout: Rollout, nodes: Tensor, result: StepResult, step: int) -> Tensor:
        """Return the mean over transitions of the error of those on the best path of their tree: ()."""
        best = best_paths(rollout.buffer, rollout.plan.plan, self._total(rollout))[nodes]
        error = best_path_error(result.mean, rollout.buffer.latents(nodes), self._scale(rollout, step))
        return (error * best.to(error)).mean()

    def _direction(self, rollout: Rollout, nodes: Tensor) -> Tensor:
        """Return half the difference of the final latents of each chain and its partner: (n, C, *spatial)."""
        buffer = rollout.buffer
        chain = nodes // buffer.nodes_per_sample
        own, other = (buffer.latents(buffer.leaves[index]) for index in (chain, chain ^ 1))
        return (own - other) / 2

    def _scale(self, rollout: Rollout, step: int) -> Tensor:
        """Return the derivative of a step's mean by the denoiser's velocity: ()."""
        row, level = rollout.plan.plan.rows[step], self.levels[step]
        move = transition(row.solver, level, self.levels[step + 1], row.noise_level)
        return (1 - level.sigma) * move.m_noise - level.sigma * move.m_x0

    def _kl(self, rollout: Rollout, result: StepResult, reference: Tensor, step: int) -> Tensor:
        if self.config.kl_kind == "published":
            solver = rollout.plan.plan.rows[step].solver
            return published_kl(result.mean, reference, result.std, self.levels[step], self.levels[step + 1], solver)
        return gaussian_kl(result.mean, reference, result.std)

    # Checks and evaluations -----------------------------------------------------------------------------------------

    def on_first_batch(self, batch: Rollout) -> None:
        """Replay stored steps at unchanged weights: no log-ratio may exceed a tenth of the clip range."""
        drift, steps = {}, batch.plan.plan.trained_steps
        for some in micro_batches(len(steps), self.config.train_times_per_forward):
            parts = [self._first_transitions(batch, step) for step in steps[some]]
            for step, nodes, result in zip(steps[some], parts, self._replays(batch, parts), strict=True):
                drift[step] = (density(result) - batch.buffer.log_prob[nodes]).abs().max().item()
        if max(drift.values()) > self.clip / 10:
            table = ", ".join(f"step {step}: {value:.2e}" for step, value in drift.items())
            raise CannotTrain(
                f"replayed log-probs drift by more than a tenth of the clip range {self.clip:.2e} ({table}): set "
                "old_log_prob: recompute, or make train_batch_size equal to rollout_batch_size and train in float32"
                + extremes(self.config)
            )

    def probe(self, batch: Rollout) -> list[Tensor]:
        """Return the log-probs of the first trained step."""
        nodes = self._first_transitions(batch, batch.plan.plan.trained_steps[0])
        return [density(self._replay(batch, nodes))]

    def _first_transitions(self, batch: Rollout, step: int) -> Tensor:
        return self._transitions(batch, torch.arange(trees(batch)), step)[: self.config.train_batch_size]


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


def trees(rollout: Rollout) -> int:
    """Return the number of trees of a rollout; samples, if its plan does not branch."""
    return len(rollout.buffer.leaves) // leaves_per_tree(rollout.plan.plan)


def leaves_of(plan: Plan, chosen: Tensor) -> Tensor:
    """Return the leaves of some trees, by their order in the buffer."""
    count = leaves_per_tree(plan)
    return (chosen[:, None] * count + torch.arange(count)).flatten()


def split_by_parent(nodes: Tensor, parent: Tensor, size: int) -> list[Tensor]:
    """Split nodes, the children of each parent consecutive, into parts of the children of at most ``size`` parents."""
    if not len(nodes):
        return []
    above = parent[nodes]
    begins = torch.cat([torch.zeros(1, dtype=torch.bool), above[1:] != above[:-1]])
    return list(torch.split(nodes, torch.bincount(begins.cumsum(0) // size).tolist()))


def density(result: StepResult) -> Tensor:
    """Return the log-prob of a stochastic step, (B,)."""
    assert result.log_prob is not None
    return result.log_prob


def averaged(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of scalars."""
    total = sum(weights) or 1.0  # steps without weight train nothing
    return torch.stack([weight / total * value for weight, value in zip(weights, values, strict=True)]).sum()


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
