"""Diffusion-DPO (arXiv 2311.12908) and related losses: preferences as differences of denoising errors.

An optimizer step trains on ``num_pairs`` pairs of a data set or, online, on pairs of the model's own images, ranked by
rewards, or on pairs of its sampling steps (``siblings``). Both images of a pair share the noise level and the noise;
policy and reference predict the same batch.

Departures from the paper's code: 1. the reference is the model itself with its adapter off, in the same precision, so
that the first loss is ln 2 to the last bit; 2. latents are the mean of the encoder's distribution; 3. crop and flip are
the same for both images of a pair.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.data.stream import PairStream
from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.options import AutoBeta, margin_size
from diffalign.losses.preference_metrics import preference_metrics, single_metrics
from diffalign.losses.registry import get_loss
from diffalign.losses.unpaired import SingleObjective
from diffalign.models.weights import POLICY, REFERENCE
from diffalign.rewards.support.probe import try_rewards
from diffalign.rollout.collector import Collector
from diffalign.rollout.forward_process import ForwardProcess, Noised, TimeSampling
from diffalign.rollout.sampler import micro_batches
from diffalign.runtime.ema import EMA
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.interfaces import Metrics, MicroBatch, MiniBatch, State
from diffalign.runtime.run import Run
from diffalign.runtime.state import indexed, restore
from diffalign.structures import Level
from diffalign.trainers.algorithm import Algorithm
from diffalign.trainers.base import Trainer
from diffalign.trainers.contents import check_sample_sources, sample_contents
from diffalign.trainers.diffusion_dpo.batches import (
    DataSource,
    PreferenceBatch,
    RolloutSource,
    Source,
    StreamSource,
    open_stream,
    read_data,
    sampled_digest,
)
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.cost import COST
from diffalign.trainers.diffusion_dpo.latents import Examples, LatentEncoder
from diffalign.trainers.diffusion_dpo.siblings import PathSource, SiblingSource
from diffalign.trainers.diffusion_dpo.spin import SelfPlaySource
from diffalign.trainers.diffusion_dpo.step_pairs import StepExamples, step_sides
from diffalign.trainers.inputs import Inputs, check_differentiable, check_groups, evaluation_rewards, read_rewards
from diffalign.trainers.registry import register_algorithm

TRIAL = {
    "train_data": ["{assets}/preferences/shapes.parquet"],
    "data": {"scan": 8},
    "num_pairs": 4,
    "train_batch_size": 4,
    "cache": False,
}


@register_algorithm("diffusion_dpo", config=DiffusionDPOConfig, cost=COST, trial=TRIAL)
class DiffusionDPO(Algorithm[DiffusionDPOConfig, PreferenceBatch]):
    """Preference losses on denoising errors of pairs or single images."""

    collapse_remedy = (
        "Go on from an earlier checkpoint with half the learning_rate, a larger beta, or an anchor_weight above 0."
    )

    @classmethod
    def read_inputs(
        cls, config: DiffusionDPOConfig, reward_funcs: Any, train_dataset: Any
    ) -> Inputs[DiffusionDPOConfig]:
        """Validate the configuration, and read rewards and preference data."""
        inputs = Inputs(config)
        if reward_funcs is not None or config.rewards:
            config, rewards, weights = read_rewards(config, reward_funcs)
            if config.compares_children and config.siblings.resolve().nudge:
                check_differentiable(rewards)
            inputs = Inputs(config, rewards=rewards, weights=weights)
        config.validate()
        data = read_data(config, train_dataset)
        prompts = data if config.online and isinstance(data, Sequence) else ()
        try_rewards(inputs.rewards, prompts, config.resolution)
        judges = evaluation_rewards(config.eval_rewards, inputs.rewards, config.allow_reward_code)
        return dataclasses.replace(inputs, data=data, eval_rewards=judges)

    @classmethod
    def check_processes(cls, inputs: Inputs[DiffusionDPOConfig], processes: int) -> None:
        """Raise ValueError where pairs or groups do not divide over the processes."""
        config = inputs.config
        if config.online:
            config.validate_batches(processes)
            check_groups(inputs.rewards, config.num_groups, processes)
            if config.num_groups % processes:
                raise ValueError(f"pairs need whole groups: make num_groups a multiple of the {processes} processes")
        elif config.num_pairs % processes:
            raise ValueError(f"num_pairs {config.num_pairs} does not divide by {processes} processes")

    @classmethod
    def keeps_reference(cls, config: DiffusionDPOConfig) -> bool:
        """Return whether the loss compares with the base model; a moving reference has weights of its own."""
        return config.compares and not config.reference_moves

    def __init__(self, run: Run[DiffusionDPOConfig], inputs: Inputs[DiffusionDPOConfig]) -> None:
        super().__init__(run, inputs)
        config = run.config
        self.kind = get_loss(config.loss)
        self.objective = config.objective() if self.kind.paired else None
        self.single = None if self.kind.paired else SingleObjective(config.loss, config.loss_options, run.accelerator)
        self.source = self._source(inputs)
        times = TimeSampling(config.time_sampling, config.time_mean, config.time_std, tuple(config.times))
        self.forward = ForwardProcess(run, times, config.prompt_dropout)
        self.updates_per_iteration = config.updates_per_rollout if config.online else 1
        self.world_size_invariant = self.updates_per_iteration == 1  # else each process splits its own pairs

        self.reference = None
        if config.compares and config.reference_moves:
            self.reference = EMA(run.model.weights.trainable, config.reference_decay, warmup=False)
            run.model.weights.add(REFERENCE, self.reference.shadow)
        low, high = config.auto_beta_range
        self.auto_beta = AutoBeta(low=low, high=high, target=config.auto_beta) if config.auto_beta else None
        self.warned = False

    def _source(self, inputs: Inputs[DiffusionDPOConfig]) -> Source:
        run, config, data = self.run, self.config, inputs.data
        if config.online:
            collector = Collector(run, data, inputs.rewards, inputs.weights)
            self.data_digest, self.digest_with_paths = collector.digests()
            if config.compares_children:
                return SiblingSource(run, collector)
            return (PathSource if config.pairs == "siblings" else RolloutSource)(run, collector, self.kind)
        encoder = LatentEncoder(run)
        data = open_stream(run) if data is None else data
        if isinstance(data, PairStream):
            return StreamSource(run, data, encoder)
        check_sample_sources(run.model, data)
        self.data_digest = sampled_digest(data)
        self.data_contents = {"samples of train_data": sample_contents(data)}
        source = DataSource(run, data, encoder)
        return source if config.losers == "data" else SelfPlaySource(run, source)

    # An iteration ---------------------------------------------------------------------------------------------------

    def sample(self, iteration: int) -> PreferenceBatch:
        """Read and encode examples, or sample the images that become examples."""
        return self.source.sample(iteration)

    def score(self, batch: PreferenceBatch) -> None:
        """Score sampled images."""
        self.source.score(batch)

    def advantage(self, batch: PreferenceBatch) -> None:
        """Pair sampled images by their scores; encode all prompts, so that updates load no text encoder."""
        self.source.rank(batch)
        self.run.prompts.prepare(batch.ranked.texts, empty=True)

    def minibatches(self, batch: PreferenceBatch, iteration: int) -> Iterator[MiniBatch]:
        """Split the iteration's examples at random into optimizer steps, and each step into passes."""
        examples = batch.ranked
        count = len(examples.texts)
        order = self.run.rng.permutation(count, "minibatches", iteration, self.run.rank)
        size = -(-count // self.updates_per_iteration)

        for update in range(self.updates_per_iteration):
            # A process with too few examples for all updates starts over.
            own = order[torch.arange(update * size, (update + 1) * size) % count]
            passes = [own[rows] for rows in micro_batches(len(own), self.config.train_batch_size)]
            yield MiniBatch([MicroBatch(rows, len(rows) / len(own), examples) for rows in passes], own)

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some examples, and metrics."""
        examples, rows = micro.data, micro.rows
        sides, level = self.compare(examples, rows, self.run.progress.step)
        weight = examples.weight[rows].to(self.model.device)
        label = examples.label[rows].to(self.model.device)
        if self.kind.paired:
            position = level[torch.arange(len(rows))].time / self.model.num_train_timesteps
            loss, metrics = self._paired(sides, label, position)
        else:
            loss, metrics = self._single(sides, label, weight)
        return (weight * loss).mean(), metrics

    def _paired(self, sides: Sequence[Denoised], label: Tensor, position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.objective is not None
        winner, loser = sides
        pair = DenoisedPair(winner, loser)
        soft = {"label": label} if "label" in self.kind.options else {}
        loss = self.objective(pair, beta=self.beta, **soft)
        strength = 1.0 if self.beta is None else self.beta
        metrics = preference_metrics(pair, beta=strength, position=position, bins=self.config.bins)
        if self.auto_beta is not None:
            metrics |= {"margin_size": margin_size(pair), "beta": self.auto_beta.beta}
        return loss, metrics

    def _single(self, sides: Sequence[Denoised], label: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.single is not None
        (image,), liked = sides, label > 0.5
        return self.single(image, liked, self.beta, weight), single_metrics(image, liked)

    @property
    def beta(self) -> float | Tensor | None:
        """Strength of the preference, in units of the errors; None for a loss without beta."""
        if self.auto_beta is not None:
            return self.auto_beta.beta.to(self.model.device)
        return self.kind.beta if self.config.beta is None else self.config.beta

    def compare(
        self, examples: Examples | StepExamples, rows: Tensor, step: int, *, compare: bool | None = None
    ) -> tuple[list[Denoised], Level]:
        """Evaluate some examples with policy and reference, as in optimizer step ``step`` (from 0).

        Returns:
            The sides of each example; a level per example, and for noised images K times these.
        """
        if not isinstance(examples, StepExamples):
            sides, noised = self.denoise(examples, rows, step, compare=compare)
            return sides, noised.level
        return step_sides(
            self.model,
            examples,
            rows,
            self.run.prompts([examples.texts[index] for index in rows.tolist()]),
            compare=self.config.compares if compare is None else compare,
            reduction=self.config.reduction,
        )

    def denoise(
        self, examples: Examples, rows: Tensor, step: int, *, compare: bool | None = None
    ) -> tuple[list[Denoised], Noised]:
        """Noise examples as in optimizer step ``step`` (from 0), and denoise them with policy and reference.

        All K images of an example share time, noise and prompt dropout, and all images are one batch, winners first.

        Returns:
            K sides of P examples; the batch of K P noised latents.
        """
        latents = examples.latents[rows].transpose(0, 1)
        sides = len(latents)
        ids = [examples.number[i] for i in rows.tolist()] * sides
        noised = self.forward.noise(latents.flatten(0, 1), ids, step)
        texts = [examples.texts[i] for i in rows.tolist()] * sides
        sizes = examples.sizes
        columns = None if sizes is None else [sizes[i][side] for side in range(sides) for i in rows.tolist()]
        conditioning = self.forward.conditioning(texts, ids, step, columns)

        compare = self.config.compares if compare is None else compare
        outputs = self.forward.predict(noised, conditioning, (REFERENCE, POLICY) if compare else (POLICY,))
        mask = None if examples.mask is None else examples.mask[rows].to(self.model.device, non_blocking=True)
        references = outputs[REFERENCE].chunk(sides) if compare else [None] * sides
        return [
            Denoised(output, goal, reference, mask, reduction=self.config.reduction)
            for output, goal, reference in zip(
                outputs[POLICY].chunk(sides), noised.target.chunk(sides), references, strict=True
            )
        ], noised

    # The reference --------------------------------------------------------------------------------------------------

    def on_step(self, batch: PreferenceBatch, metrics: Metrics) -> None:
        """Update the moving reference and beta; warn when winners get worse than the reference."""
        every = self.config.reference_steps
        if self.reference is not None and (not every or self.run.progress.step % every == 0):
            self.reference.update()
        if self.auto_beta is not None:
            self.auto_beta.update(torch.tensor(metrics["margin_size"]))
        self._warn(metrics)

    def _warn(self, metrics: Metrics) -> None:
        both = max(metrics.get("winner_gain", 0.0), metrics.get("loser_gain", 0.0)) < 0
        if both and metrics["accuracy"] > 0.8 and not self.warned:
            self.warned = True
            steps = self.config.pairs == "siblings"
            worse = "are less likely than under" if steps else "are denoised worse than by"
            warnings.warn(
                f"accuracy is {metrics['accuracy']:.2f}, but winners {worse} the reference, as losers are: margins "
                "grow by ruining both. Try winner_mu: 0.9, a winner_weight, or smaller steps",
                stacklevel=2,
            )

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> PreferenceBatch:
        """Rebuild the rollout and its examples."""
        batch = self.source.restored(iteration, tensors)
        batch.metrics = metrics
        return batch

    def state_dict(self) -> State:
        """Return the moving reference, beta, running means and stream cursors."""
        tensors = {} if self.reference is None else indexed(self.reference.shadow)
        plain: dict[str, Any] = {"warned": self.warned, **self.source.state_dict()}
        if self.single is not None:
            plain["reward_shift"] = self.single.state_dict()
        if self.auto_beta is not None:
            plain["auto_beta"] = self.auto_beta.state_dict()
        return tensors, plain

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned. Raises ValueError if a stream was read by other processes."""
        tensors, plain = state
        if self.reference is not None:
            restore(self.reference.shadow, tensors)
        if self.single is not None:
            self.single.load_state_dict(plain["reward_shift"])
        if self.auto_beta is not None:
            self.auto_beta.load_state_dict(plain["auto_beta"])
        self.warned = plain["warned"]
        self.source.load_state_dict(plain)

    # Checks and evaluations -----------------------------------------------------------------------------------------

    def on_first_batch(self, batch: PreferenceBatch) -> None:
        """Check that an unchanged policy predicts exactly what the reference predicts."""
        if not self.config.compares:
            return
        sides, _ = self.compare(batch.ranked, self._first_rows(batch), 0)
        worst = max(side.shift.abs().max().item() for side in sides)
        if worst > 0:
            raise CannotTrain(
                f"policy and reference differ by {worst:.2e} before the first update: dropout or another source of "
                "randomness in the denoiser is on; turn it off"
            )

    def probe(self, batch: PreferenceBatch) -> list[Tensor]:
        """Return the policy's outputs on the first examples, noised as in the first optimizer step."""
        sides, _ = self.compare(batch.ranked, self._first_rows(batch), 0, compare=False)
        return [side.output for side in sides]

    def _first_rows(self, batch: PreferenceBatch) -> Tensor:
        return torch.arange(min(self.config.train_batch_size, len(batch.ranked.texts)))

    @property
    def num_steps(self) -> int:
        """Sampling steps of the plan."""
        return self.config.plan.num_steps


class DiffusionDPOTrainer(Trainer[DiffusionDPOConfig]):
    """Train a model on preferences with Diffusion-DPO and related losses.

    Args:
        model: A path, a hub id or a ``DiffusionModel``; default: ``args.model``.
        args: The configuration.
        reward_funcs: Rewards that rank the model's own images into pairs; as for ``FlowGRPOTrainer``.
        train_dataset: Result of ``load_pairs``, ``stream_pairs`` or ``load_labelled``; with rewards a list of
            ``Prompt``; default: the files that ``args`` names.
        eval_dataset: A list of ``Prompt``; default: ``args.eval_prompts``.

    Raises:
        ValueError, FileNotFoundError: Before any work, if something is missing or does not fit.
    """

    algorithm_class = DiffusionDPO
