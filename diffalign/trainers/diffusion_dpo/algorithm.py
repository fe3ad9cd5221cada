"""Diffusion-DPO (arXiv 2311.12908) and related losses: preferences as differences of denoising errors.

An optimizer step trains on ``num_pairs`` pairs of a data set or, online, on pairs of the model's own images, ranked by
rewards. Both images of a pair share the noise level and the noise; policy and reference predict the same batch.

Departures from the paper's code: 1. the reference is the model itself with its adapter off, in the same precision, so
that the first loss is ln 2 to the last bit; 2. latents are the mean of the encoder's distribution; 3. crop and flip are
the same for both images of a pair.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.stream import PairStream
from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.options import AutoBeta, margin_size
from diffalign.losses.preference_metrics import preference_metrics, single_metrics
from diffalign.losses.registry import get_loss
from diffalign.losses.unpaired import SingleObjective
from diffalign.models import DiffusionModel
from diffalign.models.weights import REFERENCE
from diffalign.rewards.base import Reward, RewardFunction
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.record import reward_record
from diffalign.rollout.sampler import micro_batches
from diffalign.runtime.ema import EMA
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.loop import Metrics, MicroBatch, MiniBatch
from diffalign.runtime.provenance import digest
from diffalign.runtime.state import indexed, restore
from diffalign.structures import Level, Prompt
from diffalign.trainers.arguments import check_groups, evaluation_rewards, reward_table
from diffalign.trainers.base import Trainer, named_model
from diffalign.trainers.collector import Collector
from diffalign.trainers.contents import sample_contents
from diffalign.trainers.denoising import Denoising
from diffalign.trainers.diffusion_dpo.batches import (
    Data,
    DataSource,
    RolloutSource,
    Source,
    StreamSource,
    open_stream,
    read_data,
    sampled_digest,
)
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.latents import LatentEncoder
from diffalign.trainers.diffusion_dpo.spin import SelfPlaySource


class DiffusionDPOTrainer(Trainer):
    """Train a model on preferences with Diffusion-DPO and related losses.

    model: a path, a hub id or a ``DiffusionModel``; default ``args.model``. args: the configuration.
    reward_funcs: rewards that rank the model's own images into pairs; as for ``FlowGRPOTrainer``.
    train_dataset: result of ``load_pairs``, ``stream_pairs`` or ``load_labelled``; with rewards a list of ``Prompt``;
        default: what ``args`` names. eval_dataset: a list of ``Prompt``.

    ValueError or FileNotFoundError before any work where something is missing or does not fit.
    """

    name = "diffusion_dpo"
    args: DiffusionDPOConfig

    def __init__(
        self,
        model: str | Path | DiffusionModel | None = None,
        args: DiffusionDPOConfig | None = None,
        reward_funcs: str | RewardFunction | Reward | Sequence | Mapping[str, float] | None = None,
        train_dataset: Data | None = None,
        eval_dataset: Sequence[Prompt] | None = None,
    ) -> None:
        args = named_model(args or DiffusionDPOConfig(), model)
        self.rewards: dict[str, Reward] = {}
        weights: dict[str, float] = {}
        if reward_funcs is not None or args.rewards:
            given = args.rewards if reward_funcs is None else reward_funcs
            self.rewards, weights = reward_table(given, args.allow_reward_code)
            if reward_funcs is not None:
                args = dataclasses.replace(args, rewards=reward_record(given, self.rewards))
        args.validate()
        self.kind = get_loss(args.loss)
        data = read_data(args, train_dataset)
        try_rewards(self.rewards, data if args.online and isinstance(data, Sequence) else (), args.resolution)
        judges = evaluation_rewards(args.eval_rewards, self.rewards, args.allow_reward_code)
        if not judges and (eval_dataset or args.eval_prompts):
            raise ValueError("eval_rewards is missing: name the rewards that judge the held-out images")
        moves = bool(args.reference_decay or args.reference_steps)
        self.compares = self.kind.reference or (self.kind.paired and args.objective().needs_reference)
        super().__init__(
            model,
            args,
            judges,
            eval_dataset,
            keep_reference=self.compares and not moves,
            eval_batch_size=args.rollout_batch_size,
        )
        self.objective = args.objective() if self.kind.paired else None
        self.single = None if self.kind.paired else SingleObjective(args.loss, args.loss_options, self.accelerator)
        self.source = self._source(data, weights)
        self.denoising = Denoising(self.encoded, args, self.noise, self.compares)
        self.updates_per_iteration = args.updates_per_rollout if args.online else 1
        self.world_size_invariant = self.updates_per_iteration == 1  # else each process splits its own pairs
        self._moving_reference()
        low, high = args.auto_beta_range
        self.auto_beta = AutoBeta(low=low, high=high, target=args.auto_beta) if args.auto_beta else None
        self.warned = False

    # Data -----------------------------------------------------------------------------------------------------------

    def _source(self, data: Data | None, weights: Mapping[str, float]) -> Source:
        args, accelerator = self.args, self.accelerator
        if args.online:
            collector = Collector(self, data, self.rewards, weights)
            self.data_digest = digest(collector.texts())
            return RolloutSource(collector, args.data.rollouts, self.kind, accelerator)
        share = args.num_pairs // accelerator.num_processes
        first = share * accelerator.process_index
        framer = LatentEncoder(self.encoded, args, self.noise, range(first, first + share))
        data = open_stream(args, self.noise, accelerator) if data is None else data
        if isinstance(data, PairStream):
            return StreamSource(data, framer, accelerator)
        self.data_digest = sampled_digest(data)
        self.data_contents = {"samples of train_data": sample_contents(data)}
        source = DataSource(data, framer)
        return source if args.losers == "data" else SelfPlaySource(source, self)

    def check_batches(self, processes: int) -> None:
        """Raise ValueError where pairs or groups do not divide over the processes."""
        args = self.args
        if args.online:
            args.validate_batches(processes)
            check_groups(self.rewards, args.num_groups, processes)
            if args.num_groups % processes:
                raise ValueError(f"pairs need whole groups: make num_groups a multiple of the {processes} processes")
        elif args.num_pairs % processes:
            raise ValueError(f"num_pairs {args.num_pairs} does not divide by {processes} processes")

    @property
    def eval_levels(self) -> Level:
        """Levels of ``eval_num_steps``, else of the plan."""
        return self.model.levels(self.args.eval_num_steps or self.args.plan.num_steps, self.args.schedule)

    def collect(self, iteration: int) -> Metrics:
        """Collect the examples of an iteration and encode their prompts."""
        self.examples, metrics = self.source(iteration)
        self.encoded.prepare(self.examples.texts, empty=True)  # so that no text encoder is loaded during the update
        return metrics

    def collected(self) -> dict[str, Tensor]:
        """The rollout of an online run; empty for data sets, which are read again."""
        return self.source.rollout.buffer.drawn() if isinstance(self.source, RolloutSource) else {}

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore the rollout and its examples."""
        assert isinstance(self.source, RolloutSource)
        self.examples = self.source.examples(self.source.collector.restored(iteration, tensors))[0]

    def ids(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """Number and prompt of each example of an optimizer step."""
        rows = minibatch.rows.tolist()
        return [{"number": self.examples.number[i], "prompt": self.examples.texts[i]} for i in rows]

    # Update ---------------------------------------------------------------------------------------------------------

    def minibatches(self, iteration: int) -> Iterator[MiniBatch]:
        """Split the iteration's examples at random into optimizer steps, and each step into passes."""
        count = len(self.examples.texts)
        order = self.noise.permutation(count, "minibatches", iteration, self.accelerator.process_index)
        size = -(-count // self.updates_per_iteration)

        for update in range(self.updates_per_iteration):
            # A process with too few examples for all updates starts over.
            own = order[torch.arange(update * size, (update + 1) * size) % count]
            passes = [own[rows] for rows in micro_batches(len(own), self.args.train_batch_size)]
            yield MiniBatch([MicroBatch(rows, len(rows) / len(own)) for rows in passes], own)

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some examples, and metrics."""
        rows = micro.rows
        sides, level = self.denoise(rows, self.loop.step)
        weight = self.examples.weight[rows].to(self.model.device)
        label = self.examples.label[rows].to(self.model.device)
        if self.kind.paired:
            loss, metrics = self._paired(sides, label, level)
        else:
            loss, metrics = self._single(sides, label, weight)
        return (weight * loss).mean(), metrics

    def _paired(self, sides: Sequence[Denoised], label: Tensor, level: Level) -> tuple[Tensor, dict[str, Tensor]]:
        pair = DenoisedPair(*sides)
        soft = {"label": label} if "label" in self.kind.options else {}
        loss = self.objective(pair, beta=self.beta, **soft)
        position = level.time / self.model.num_train_timesteps
        strength = 1.0 if self.beta is None else self.beta
        metrics = preference_metrics(pair, beta=strength, position=position, bins=self.args.bins)
        if self.auto_beta is not None:
            metrics |= {"margin_size": margin_size(pair), "beta": self.auto_beta.beta}
        return loss, metrics

    def _single(self, sides: Sequence[Denoised], label: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (image,), liked = sides, label > 0.5
        return self.single(image, liked, self.beta, weight), single_metrics(image, liked)

    @property
    def beta(self) -> float | Tensor | None:
        """Strength of the preference, in units of the errors; None for a loss without beta."""
        if self.auto_beta is not None:
            return self.auto_beta.beta.to(self.model.device)
        return self.kind.beta if self.args.beta is None else self.args.beta

    def denoise(self, rows: Tensor, step: int) -> tuple[list[Denoised], Level]:
        """Noise and denoise examples of the iteration: see ``Denoising``."""
        return self.denoising(self.examples, rows, step)

    # The reference --------------------------------------------------------------------------------------------------

    def _moving_reference(self) -> None:
        """Add the weight set of a reference that follows the policy."""
        args, self.reference = self.args, None
        if self.compares and (args.reference_decay or args.reference_steps):
            self.reference = EMA(self.loop.parameters, args.reference_decay, warmup=False)
            self.model.weights.add(REFERENCE, self.reference.shadow)

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Update the moving reference and beta; warn when winners get worse than the reference."""
        every = self.args.reference_steps
        if self.reference is not None and (not every or step % every == 0):
            self.reference.update()
        if self.auto_beta is not None:
            self.auto_beta.update(torch.tensor(metrics["margin_size"]))
        self._warn(metrics)

    def _warn(self, metrics: Metrics) -> None:
        both = max(metrics.get("winner_gain", 0.0), metrics.get("loser_gain", 0.0)) < 0
        if both and metrics["accuracy"] > 0.8 and not self.warned:
            self.warned = True
            warnings.warn(
                f"accuracy is {metrics['accuracy']:.2f}, but winners are denoised worse than by the reference, as "
                "losers are: margins grow by ruining both. Try winner_mu: 0.9, a winner_weight, or smaller steps",
                stacklevel=2,
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the moving reference, beta, running means and stream cursors."""
        tensors = {} if self.reference is None else indexed(self.reference.shadow)
        plain: dict[str, Any] = {"warned": self.warned}
        if self.single is not None:
            plain["reward_shift"] = self.single.state_dict()
        if self.auto_beta is not None:
            plain["auto_beta"] = self.auto_beta.state_dict()
        if isinstance(self.source, StreamSource):
            plain["cursors"] = self.source.cursors
        return tensors, plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned. ValueError: a stream was read by another number of processes."""
        if self.reference is not None:
            restore(self.reference.shadow, tensors)
        if self.single is not None:
            self.single.load_state_dict(plain["reward_shift"])
        if self.auto_beta is not None:
            self.auto_beta.load_state_dict(plain["auto_beta"])
        self.warned = plain["warned"]
        if isinstance(self.source, StreamSource):
            self.source.resume(plain["cursors"])

    # Checks ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_on_policy(self) -> None:
        """Check that an unchanged policy predicts exactly what the reference predicts, on what ``probe`` denoised."""
        if not self.compares:
            return
        worst = max(side.shift.abs().max().item() for side in self.first_sides)
        if worst > 0:
            raise CannotTrain(
                f"policy and reference differ by {worst:.2e} before the first update: dropout or another source of "
                "randomness in the denoiser is on; turn it off"
            )

    def probe(self) -> list[Tensor]:
        """Outputs of the policy on the first examples, noised as in the first optimizer step."""
        rows = torch.arange(min(self.args.train_batch_size, len(self.examples.texts)))
        self.first_sides, _ = self.denoise(rows, 0)
        return [side.output for side in self.first_sides]

    @property
    def has_gradient(self) -> bool:
        """Whether any example of the iteration counts."""
        return bool(self.examples.weight.any())
