"""Forward-process RL: denoising losses on the final images of rollouts, weighted by advantages.

DiffusionNFT (arXiv 2509.16117), AWM (2509.25050), DGPO (2510.08425), CRD (2603.14128), RAM (2605.10759) and their kin
keep of a rollout only its final latents, conditions and rewards. Any sampler may draw them. An optimizer step noises
the latents again, at K times each, and compares the policy's output with those of lagged weights and of the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.losses.forward import ForwardStep, anchor_weight, mean_square
from diffalign.losses.nft import optimality
from diffalign.losses.registry import get_forward_objective
from diffalign.models.weights import POLICY, REFERENCE
from diffalign.rollout.collector import Rollout
from diffalign.rollout.forward_process import ForwardProcess, Noised, TimeSampling, noised
from diffalign.rollout.rebalance import rebalanced
from diffalign.rollout.sampler import micro_batches
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.interfaces import Metrics, MicroBatch, MiniBatch, State
from diffalign.runtime.run import Run
from diffalign.structures import Conditioning
from diffalign.trainers.base import Trainer
from diffalign.trainers.forward_rl.advantages import transformed
from diffalign.trainers.forward_rl.config import ForwardRLConfig
from diffalign.trainers.forward_rl.copies import LaggedCopies
from diffalign.trainers.forward_rl.cost import COST, Needs, needs
from diffalign.trainers.forward_rl.times import TrainingTimes
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
    "plan": {"preset": "ode", "num_steps": 4},
    "num_times": 2,
}
NOISE = "forward_rl/noise"


@dataclass
class UpdateData:
    """Data that the passes of one optimizer step index.

    Attributes:
        rollout: Samples of the step, and possibly others.
        samples: (n,), the rows of this process in the step.
        iteration: Index of the iteration.
        times: (L, K), drawn times of every leaf of the rollout.
        group_mean: (L, K, S), means of the objective's statistic; None until the first pass needs them.
    """

    rollout: Rollout
    samples: Tensor
    iteration: int
    times: Tensor
    group_mean: Tensor | None = None


@dataclass(frozen=True)
class Denoised:
    """Noised latents of a pass and the outputs of all weight sets; rows are (image, time) pairs, sorted by time.

    Attributes:
        step: Input of the objective.
        outputs: Weight set -> output; without gradients but for the policy's.
        guided_reference: Guided output of the base model; None unless an anchor needs it.
        group: (B,), group of each pair.
        slot: (B,), index of its time.
    """

    step: ForwardStep
    outputs: Mapping[str, Tensor]
    guided_reference: Tensor | None
    group: Tensor
    slot: Tensor


@register_algorithm("forward_rl", config=ForwardRLConfig, cost=COST, trial=TRIAL)
class ForwardRL(RolloutAlgorithm[ForwardRLConfig]):
    """Denoising losses on final images of rollouts, with advantages relative to the group."""

    leaves_only = True
    collapse_remedy = (
        "Go on from an earlier checkpoint with an anchor to the base (reference_weight: 0.1), half the learning_rate, "
        "or copies that lag more (a higher slope and maximum of old_lag and sample_lag)."
    )

    @classmethod
    def keeps_reference(cls, config: ForwardRLConfig) -> bool:
        """Return whether the objective or an anchor compares with the base model."""
        return needs(config, 1).reference

    def __init__(self, run: Run[ForwardRLConfig], inputs: Inputs[ForwardRLConfig]) -> None:
        super().__init__(run, inputs)
        config, self.method = run.config, run.config.method
        self.objective = get_forward_objective(self.method.objective)
        self.options = self.objective.resolve(self.method.objective_options)

        levels = self.collector.levels
        self.times = TrainingTimes(self.method, config.times_per_image, config.grid_steps, levels, run.model)
        self.forward = ForwardProcess(run, TimeSampling())
        self.copies = LaggedCopies(run.model.weights, self.needs.lags, config.updates_per_rollout)

    @property
    def needs(self) -> Needs:
        """Outputs that passes need; batch sizes may shrink during a run, and groups with them."""
        return needs(self.config, self.run.world)

    # An iteration ---------------------------------------------------------------------------------------------------

    def sample(self, iteration: int) -> Rollout:
        """Sample the images of an iteration, with the lagged weights where the method says so."""
        with self.model.using(self.copies.sets["sample"]):
            return self.collector.sample(iteration)

    def advantage(self, batch: Rollout) -> None:
        """Compute advantages within groups; keep those of one sign, or scale them, as the method says."""
        self.collector.advantage(batch)
        advantage = batch.buffer.advantage
        batch.buffer.advantage = transformed(advantage, self.method.advantage_mode, self.method.advantage_scale)

    # Update ---------------------------------------------------------------------------------------------------------

    def minibatches(self, batch: Rollout, iteration: int) -> Iterator[MiniBatch]:
        """Assign the iteration's images to optimizer steps, and split each step into passes over (images, times)."""
        config, count = self.config, len(batch.buffer.leaves)
        order = self.run.rng.permutation(count, "minibatches", iteration, self.run.rank)
        if self.needs.statistic is not None and self.needs.over == "group":
            order = torch.arange(count)  # whole groups stay together
        update_of = self.collector.update_index(iteration, batch.plan.plan)[order]
        blocks = micro_batches(config.times_per_image, config.train_times_per_forward)

        for update in range(config.updates_per_rollout):
            own = order[update_of == update]
            rollout, samples = rebalanced(self.run, batch, own) if self.needs.filters else (batch, own)
            data = UpdateData(rollout, samples, iteration, self._times(rollout, iteration))
            scale = len(own) * config.times_per_image
            passes = [
                MicroBatch(samples[rows], len(samples[rows]) * (block.stop - block.start) / scale, data, tag)
                for rows in micro_batches(len(samples), config.train_batch_size)
                for tag, block in enumerate(blocks)
            ]
            yield MiniBatch(passes, own, {"kept_fraction": len(samples) / len(own)} if self.needs.filters else {})

    def _times(self, rollout: Rollout, iteration: int) -> Tensor:
        keys = self._keys(rollout, torch.arange(len(rollout.buffer.leaves)), self.method.share_times, iteration)
        return self.times.draw(self.run.rng, keys)

    def _keys(self, rollout: Rollout, samples: Tensor, share: str, iteration: int) -> list[tuple[int, ...]]:
        """Return the key of each sample's random numbers; samples with equal keys share them."""
        buffer = rollout.buffer
        rows = buffer.leaves[samples]
        if share == "iteration":
            return [(iteration,)] * len(rows)
        pairs = zip(buffer.group[rows].tolist(), buffer.sample[rows].tolist(), strict=True)
        return [(iteration, group) if share == "group" else (iteration, group, sample) for group, sample in pairs]

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some images at some of their times, and metrics."""
        data = micro.data
        if self.needs.first_pass and data.group_mean is None:
            data.group_mean = self._group_means(data)
        found = self._denoise(data, micro.rows, micro.tag, self.needs.sets)
        step = found.step
        if self.needs.statistic is not None:
            step = replace(step, group_mean=self._group_mean_of(found, data, micro.rows))

        losses, metrics = self.objective.function(step, **self.options)
        loss = losses.mean()
        for name, weight, anchor in self._anchors(found):
            distance = mean_square(step.output.float() - anchor.float())
            scaled = distance * anchor_weight(self.method.anchor_weighting, step.level).to(distance)
            term = (weight * scaled).mean() if isinstance(weight, Tensor) else weight * scaled.mean()
            loss, metrics[name] = loss + term, distance.mean().detach()
        return loss, metrics

    def _anchors(self, found: Denoised) -> Iterator[tuple[str, float | Tensor, Tensor]]:
        """Yield the name, weight (of all samples or of each) and output of each anchor."""
        method = self.method
        if method.reference_weight:
            guided = found.guided_reference
            anchor = found.outputs[REFERENCE] if guided is None else guided
            yield "reference_distance", self._reference_weight(found.step.advantage), anchor
        if method.ema_weight:
            yield "ema_distance", method.ema_weight, found.outputs[self.copies.sets["ema"]]

    def _reference_weight(self, advantage: Tensor) -> float | Tensor:
        """Return the weight of the reference's anchor, of each sample where it grows with the advantage: (B,)."""
        high, low = self.method.reference_weight, self.method.reference_weight_min
        if low is None:
            return high
        return low + (high - low) * optimality(advantage, self.config.advantage_clip * self.method.advantage_scale)

    def _denoise(self, data: UpdateData, samples: Tensor, tag: int, roles: frozenset[str]) -> Denoised:
        """Noise samples at the times of a block, and predict with the policy and the weights of ``roles``."""
        noised, conditioning, slot, rows = self._noise(data, samples, tag)
        sets = {role: REFERENCE if role == "reference" else self.copies.sets[role] for role in roles - {"guided"}}
        guided = None
        if "guided" in roles:
            scale = self.method.reference_guidance
            assert scale is not None
            guidance = self.run.prompts.guidance(scale)
            guided = self.forward.predict(noised, conditioning, (REFERENCE,), guidance)[REFERENCE]
        outputs = self.forward.predict(noised, conditioning, (*sorted({*sets.values()} - {POLICY}), POLICY))

        buffer = data.rollout.buffer
        compared = {role: outputs[name].detach() for role, name in sets.items() if role != "ema"}
        step = ForwardStep(
            outputs[POLICY],
            noised.target,
            noised.level,
            buffer.advantage[rows],
            self.model.parameterization,
            self.method.estimator,
            trust_region=self.method.trust_region,
            **compared,
        )
        return Denoised(step, outputs, guided, buffer.group[rows.cpu()], slot)

    def _noise(self, data: UpdateData, samples: Tensor, tag: int) -> tuple[Noised, Conditioning, Tensor, Tensor]:
        """Return noised latents, conditioning, time indices and buffer rows of (image, time) pairs, sorted by time."""
        per_pass, rollout = self.config.train_times_per_forward, data.rollout
        block = torch.arange(self.config.times_per_image)[tag * per_pass : (tag + 1) * per_pass]
        pairs, slot = samples.repeat(len(block)), block.repeat_interleave(len(samples))
        keys = self._keys(rollout, pairs, self.method.share_noise, data.iteration)
        addresses = [(*key, time) for key, time in zip(keys, slot.tolist(), strict=True)]

        known = list(dict.fromkeys(addresses))
        place = {address: row for row, address in enumerate(known)}
        rows = rollout.buffer.leaves[pairs]
        x0 = rollout.buffer.latents(rows)
        noise = self.run.rng.normal_batch(x0.shape[1:], NOISE, known)[torch.tensor([place[a] for a in addresses])]
        level = self.times.level(data.times[pairs, slot])
        made = noised(self.model, x0, noise.to(x0.device, non_blocking=True), level)
        return made, rollout.conditioning[rollout.buffer.group[rows]], slot, rows

    # Groups ---------------------------------------------------------------------------------------------------------

    def _group_mean_of(self, found: Denoised, data: UpdateData, samples: Tensor) -> Tensor:
        """Return the means of a pass: of its own rows if it has whole groups or images, else of the first pass."""
        pairs = samples.repeat(len(found.slot) // len(samples))
        if data.group_mean is not None:
            return data.group_mean[pairs, found.slot].to(found.step.output.device)
        assert self.needs.statistic is not None
        values = self.needs.statistic(found.step, **self.options)
        label = pairs if self.needs.over == "image" else found.slot * self.config.num_groups + found.group
        return means_within(values, label.to(values.device))

    @torch.no_grad()
    def _group_means(self, data: UpdateData) -> Tensor:
        """Return the mean of the objective's statistic over each sample's group, on all processes: (L, K, S).

        Over an "image" it is the mean over its times.
        """
        assert self.needs.statistic is not None
        count, slots = len(data.samples), self.config.times_per_image
        values: dict[int, Tensor] = {}
        blocks = micro_batches(slots, self.config.train_times_per_forward)
        for part in micro_batches(count, self.config.train_batch_size):
            for tag, block in enumerate(blocks):
                self.run.heartbeat()
                found = self._denoise(data, data.samples[part], tag, self.needs.statistic_sets)
                own = self.needs.statistic(found.step, **self.options).cpu()
                for slot, rows in zip(range(block.start, block.stop), own.chunk(block.stop - block.start), strict=True):
                    values.setdefault(slot, rows.new_empty(count, rows.shape[1]))[part] = rows

        own = torch.stack([values[slot] for slot in range(slots)], 1)
        table = own.new_zeros(len(data.rollout.buffer.leaves), *own.shape[1:])
        if self.needs.over == "image":
            table[data.samples] = own.mean(1, keepdim=True).expand_as(own)
            return table
        group = data.rollout.buffer.group[data.rollout.buffer.leaves[data.samples]]
        means = means_within(self.run.gather(own), self.run.gather(group))
        table[data.samples] = means[self.run.share(len(means)).start :][:count]
        return table

    # Lagged copies and checkpoints ----------------------------------------------------------------------------------

    def on_step(self, batch: Rollout, metrics: Metrics) -> None:
        """Move the lagged copies."""
        progress = self.run.progress
        ends = progress.update + 1 == self.updates_per_iteration
        moved = self.copies.update(progress.step, ends)
        metrics.update({f"decay/{name.removeprefix('lagged_')}": decay for name, decay in moved.items()})

    def state_dict(self) -> State:
        """Return the lagged copies."""
        return self.copies.state_dict(), {}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
        self.copies.load_state_dict(state[0])

    # Checks and evaluations -----------------------------------------------------------------------------------------

    def on_first_batch(self, batch: Rollout) -> None:
        """Check that the lagged copies, which still equal the policy, predict exactly the same."""
        roles = frozenset(self.copies.sets) - {"sample"} if self.copies.lags else frozenset[str]()
        if not any(self.copies.sets[role] != POLICY for role in roles):
            return
        found = self._denoise(*self._first(batch), 0, roles)
        worst = max((out - found.outputs[POLICY]).abs().max().item() for out in found.outputs.values())
        if worst > 0:
            raise CannotTrain(
                f"a lagged copy of unchanged weights predicts something else (difference {worst:.2e}): ratios would "
                "not be 1. Switch off what makes the denoiser random or dependent on earlier passes"
            )

    def probe(self, batch: Rollout) -> list[Tensor]:
        """Return the policy's outputs on the first images."""
        return [self._denoise(*self._first(batch), 0, frozenset()).step.output]

    def _first(self, batch: Rollout) -> tuple[UpdateData, Tensor]:
        samples = torch.arange(min(self.config.train_batch_size, len(batch.buffer.leaves)))
        return UpdateData(batch, samples, 0, self._times(batch, 0)), samples


class ForwardRLTrainer(Trainer[ForwardRLConfig]):
    """Train a model on rewards with forward-process RL: NFT, AWM, EPG, PEPG, PAR, V-GRPO, DGPO, CRD or RAM.

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

    algorithm_class = ForwardRL


def means_within(values: Tensor, label: Tensor) -> Tensor:
    """Replace each row of values (N, ...) by the mean of the rows with its label (N,), in float64."""
    _, index, count = torch.unique(label, return_inverse=True, return_counts=True)
    total = values.new_zeros(len(count), *values.shape[1:], dtype=torch.float64).index_add_(0, index, values.double())
    return (total / count.view(-1, *[1] * (values.ndim - 1)))[index]
