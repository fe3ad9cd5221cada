"""Diffusion-DPO (arXiv 2311.12908) and its relatives: preferences between images as differences of denoising errors.

An optimizer step takes ``num_pairs`` pairs of data, or, online, the pairs that a rollout's rewards make of the model's
own images. Both images of a pair are noised to one level with one noise; policy and reference see the same batch.

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
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.ema import EMA
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.loop import Metrics, Micro, indexed, restore
from diffalign.runtime.provenance import digest
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
    """Trains a model on preferences.

    model: a path, a hub id or a ``DiffusionModel``; default ``args.model``. args: the configuration.
    reward_funcs: rewards that make pairs of the model's own images; as for ``FlowGRPOTrainer``.
    train_dataset: what ``load_pairs``, ``stream_pairs`` or ``load_labelled`` gave; with rewards a list of ``Prompt``;
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
        self.world_size_invariant = self.updates_per_iteration == 1  # each process splits the pairs that it found
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
        """ValueError where pairs or groups do not divide over the processes."""
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
        """Those of ``eval_num_steps``, else of the plan."""
        return self.model.levels(self.args.eval_num_steps or self.args.plan.num_steps, self.args.schedule)

    def collect(self, iteration: int) -> Metrics:
        """The examples of an iteration."""
        self.examples, metrics = self.source(iteration)
        self.encoded.prepare(self.examples.texts, empty=True)  # so that no text encoder has to come in the update
        return metrics

    def collected(self) -> dict[str, Tensor]:
        """The model's own images, as the policy of the iteration's beginning drew them; data are read again."""
        return self.source.rollout.buffer.drawn() if isinstance(self.source, RolloutSource) else {}

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on with these images."""
        assert isinstance(self.source, RolloutSource)
        self.examples = self.source.examples(self.source.collector.restored(iteration, tensors))[0]

    def samples(self) -> list[dict[str, Any]]:
        """Number and text of each example of the current update."""
        return [{"number": self.examples.number[i], "prompt": self.examples.texts[i]} for i in self.part.tolist()]

    # Update ---------------------------------------------------------------------------------------------------------

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        """Splits the iteration's examples at random into its updates, and each update into passes."""
        count = len(self.examples.texts)
        order = self.noise.permutation(count, "minibatches", iteration, self.accelerator.process_index)
        size = -(-count // self.updates_per_iteration)
        for update in range(self.updates_per_iteration):
            # A process with too few examples for all updates begins again.
            part = order[torch.arange(update * size, (update + 1) * size) % count]
            self.part = part
            passes = [part[rows] for rows in micro_batches(len(part), self.args.train_batch_size)]
            yield [self._micro(rows, len(rows) / len(part)) for rows in passes]

    def _micro(self, rows: Tensor, scale: float) -> Micro:
        return lambda: self._loss(rows, scale)

    def _loss(self, rows: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of some examples, and metrics."""
        sides, level = self.denoise(rows, self.loop.step)
        weight = self.examples.weight[rows].to(self.model.device)
        label = self.examples.label[rows].to(self.model.device)
        if self.kind.paired:
            loss, metrics = self._paired(sides, label, level)
        else:
            loss, metrics = self._single(sides, label, weight)
        return (weight * loss).mean() * scale, metrics

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
        """The strength of the preference, in units of the errors; None for a loss that has none."""
        if self.auto_beta is not None:
            return self.auto_beta.beta.to(self.model.device)
        return self.kind.beta if self.args.beta is None else self.args.beta

    def denoise(self, rows: Tensor, step: int) -> tuple[list[Denoised], Level]:
        """Some of the iteration's examples: see ``Denoising``."""
        return self.denoising(self.examples, rows, step)

    # The reference --------------------------------------------------------------------------------------------------

    def _moving_reference(self) -> None:
        """A reference that follows the policy is a weight set of its own."""
        args, self.reference = self.args, None
        if self.compares and (args.reference_decay or args.reference_steps):
            self.reference = EMA(self.loop.parameters, args.reference_decay, warmup=False)
            self.model.weights.add(REFERENCE, self.reference.shadow)

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Moves the reference and beta, and says so when a run goes wrong."""
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
        """What a checkpoint must hold besides the loop's own."""
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
        """Goes on from what ``state`` gave. ValueError: a stream that another number of processes read."""
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
    def before_first_update(self) -> None:
        """A policy that has not moved says what the reference says, to the last bit."""
        rows = torch.arange(min(self.args.train_batch_size, len(self.examples.texts)))
        self.tracked, _ = self.denoise(rows, 0)
        if not self.compares:
            return
        worst = max(side.shift.abs().max().item() for side in self.tracked)
        if worst > 0:
            raise CannotTrain(
                f"policy and reference differ by {worst:.2e} before the first update: dropout or another source of "
                "randomness in the denoiser is on; turn it off"
            )

    @torch.no_grad()
    def after_first_update(self) -> None:
        """The canary: an update must have changed what the denoiser says."""
        now, _ = self.denoise(torch.arange(len(self.tracked[0].output)), 0)
        same = all(torch.equal(a.output, b.output) for a, b in zip(now, self.tracked, strict=True))
        if same and self.examples.weight.any():
            raise CannotTrain(
                "the first update changed nothing in the denoiser's output: the trained weights are not part of it "
                "(check lora.targets), or learning_rate is too small for this precision" + extremes(self.args)
            )
