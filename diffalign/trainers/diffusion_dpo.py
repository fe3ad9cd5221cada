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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.pairs import Samples, load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.data.stream import Cursor, PairStream, stream_pairs
from diffalign.data.unpaired import load_labelled
from diffalign.diffusion.parameterization import add_noise, target
from diffalign.losses.bco import RewardShift
from diffalign.losses.diffusion_kto import reference_point
from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.options import AutoBeta, margin_size
from diffalign.losses.preference_metrics import preference_metrics, share
from diffalign.losses.registry import get_loss
from diffalign.models import DiffusionModel
from diffalign.models.weights import REFERENCE
from diffalign.rewards.base import Reward, RewardFunction
from diffalign.rollout.sampler import micro_batches
from diffalign.runtime.cache import TensorCache
from diffalign.runtime.ema import EMA
from diffalign.runtime.loop import Metrics, Micro, indexed, restore
from diffalign.runtime.origin import digest
from diffalign.structures import Conditioning, Level, Prompt
from diffalign.trainers.base import Trainer, named_model
from diffalign.trainers.diffusion_dpo_config import DiffusionDPOConfig
from diffalign.trainers.examples import DataSource, Framer, RolloutSource, Source, StreamSource
from diffalign.trainers.inputs import check_groups, evaluation_rewards, reward_table
from diffalign.trainers.rollouts import Collector

DIGESTED = 16
Data = Samples | PairStream | Sequence[Prompt]


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
            self.rewards, weights = reward_table(
                args.rewards if reward_funcs is None else reward_funcs, args.allow_reward_code
            )
            args = args if reward_funcs is None else dataclasses.replace(args, rewards=weights)
        args.validate()
        self.kind = get_loss(args.loss)
        data = self._data(args, train_dataset)
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
        self.encoded.cache = TensorCache(args.cache_folder)
        self.source = self._source(data, weights)
        self.updates_per_iteration = args.updates_per_rollout if args.online else 1
        self._moving_reference()
        low, high = args.auto_beta_range
        self.auto_beta = AutoBeta(low=low, high=high, target=args.auto_beta) if args.auto_beta else None
        self.reward_shift = RewardShift()
        self.warned = False

    # Data -----------------------------------------------------------------------------------------------------------

    def _data(self, args: DiffusionDPOConfig, given: Data | None) -> Data | Callable[[], Data]:
        """What to train on, or how to open it once processes know of each other."""
        if given is not None:
            return given
        if args.online:
            if not (args.train_prompts and args.rewards):
                raise ValueError("pairs of the model's own images need train_prompts and rewards: one is missing")
            return load_prompts(args.train_prompts)
        if not args.train_data:
            raise ValueError("train_data is missing: write train_data: [pairs.parquet], or train_prompts and rewards")
        if args.streaming:
            return lambda: self._stream(args)
        load = load_pairs if self.kind.paired else load_labelled
        return load(*args.train_data, settings=args.data)

    def _stream(self, args: DiffusionDPOConfig) -> PairStream:
        if not self.kind.paired:
            raise ValueError(f"{args.loss!r} learns from single images, which are not streamed: set streaming: false")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        permutation = lambda n, *address: self.noise.permutation(n, "stream", *address)  # noqa: E731
        return stream_pairs(*args.train_data, settings=args.data, permutation=permutation, rank=rank, world=world)

    def _source(self, data: Data | Callable[[], Data], weights: Mapping[str, float]) -> Source:
        args = self.args
        data = data() if callable(data) else data
        if args.online:
            self.collector = Collector(self, data, self.rewards, weights)
            self.data_digest = digest(self.collector.texts())
            return RolloutSource(self.collector, args.data.rollouts, self.kind)
        share = args.num_pairs // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        if not isinstance(data, PairStream):
            self.data_digest = sampled_digest(data)
        framer = Framer(self.encoded, args, self.noise, range(first, first + share))
        return StreamSource(data, framer) if isinstance(data, PairStream) else DataSource(data, framer)

    def check_batches(self, processes: int) -> None:
        """ValueError where pairs or groups do not divide over the processes."""
        args = self.args
        if args.online:
            args.validate_batches(processes)
            check_groups(self.rewards, args.num_groups, processes)
            if args.num_groups % processes:
                raise ValueError(f"pairs need whole groups: make num_groups a multiple of the {processes} processes")
            if processes > 1 and args.loss in CONTEXT:
                # It asks all processes in every pass, and those with more pairs would wait for ever.
                raise ValueError(f"{args.loss!r} on a model's own images runs in one process: use it, or another loss")
        elif args.num_pairs % processes:
            raise ValueError(f"num_pairs {args.num_pairs} does not divide by {processes} processes")

    @property
    def eval_levels(self) -> Level:
        """Those of ``eval_num_steps``, else of the plan."""
        return self.model.levels(self.args.eval_num_steps or self.args.plan.num_steps, self.args.schedule)

    def collect(self, iteration: int) -> Metrics:
        """The examples of an iteration."""
        self.examples, metrics = self.source(iteration)
        return metrics

    def collected(self) -> dict[str, Tensor]:
        """The model's own images, as the policy of the iteration's beginning drew them; data are read again."""
        return self.source.rollout.buffer.drawn() if isinstance(self.source, RolloutSource) else {}

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on with these images."""
        assert isinstance(self.source, RolloutSource)
        self.examples = self.source.examples(self.collector.restored(iteration, tensors))[0]

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
        loss, metrics = (self._paired if self.kind.paired else self._single)(sides, label, level)
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

    def _single(self, sides: Sequence[Denoised], label: Tensor, level: Level) -> tuple[Tensor, dict[str, Tensor]]:
        (image,), liked = sides, label > 0.5
        strength = {} if self.beta is None else {"beta": self.beta}
        batch = CONTEXT[self.args.loss](self, image, liked) if self.args.loss in CONTEXT else {}
        loss = self.kind.function(image, liked, **strength, **batch, **self.args.loss_options)
        return loss, single_metrics(image, liked)

    @property
    def beta(self) -> float | Tensor | None:
        """The strength of the preference, in units of the errors; None for a loss that has none."""
        if self.auto_beta is not None:
            return self.auto_beta.beta.to(self.model.device)
        return self.kind.beta if self.args.beta is None else self.args.beta

    def denoise(self, rows: Tensor, step: int) -> tuple[list[Denoised], Level]:
        """The examples ``rows``, noised as optimizer step ``step`` (from 0) does, and denoised by policy and reference.

        K sides, and their levels (P,).
        """
        examples, model, args = self.examples, self.model, self.args
        numbers = [examples.number[i] for i in rows.tolist()]
        latents = examples.latents[rows].to(model.device, non_blocking=True)
        count, sides = latents.shape[:2]
        level = model.level_at(self._times(numbers, step))
        noise = self.noise.normal_batch(latents.shape[2:], "noise", [(step, n) for n in numbers])
        noise = noise.to(model.device, non_blocking=True)
        conditioning = self._conditioning(rows, numbers, step, sides)
        # One batch for all sides, winners first, each with the noise and the level of its example.
        levels = level[torch.arange(count).repeat(sides)]
        x0, noise = latents.transpose(0, 1).flatten(0, 1), noise.repeat(sides, 1, 1, 1)
        x = add_noise(x0, noise, levels)
        goal = target(model.parameterization, x0, noise, levels)
        output = model.predict(x, levels, conditioning)
        reference = [None] * sides
        if self.compares:
            with torch.no_grad(), model.using(REFERENCE):
                reference = model.predict(x, levels, conditioning).chunk(sides)
        goals, outputs = goal.chunk(sides), output.chunk(sides)
        return [
            Denoised(o, g, r, reduction=args.reduction) for o, g, r in zip(outputs, goals, reference, strict=True)
        ], level

    def _times(self, numbers: Sequence[int], step: int) -> Tensor:
        """Times of training, (P,), float64: a draw per example and optimizer step."""
        args, end = self.args, self.model.num_train_timesteps
        drawn = [self.noise.generator("time", step, number) for number in numbers]
        if args.times:
            return torch.tensor([args.times[g.integers(len(args.times))] for g in drawn], dtype=torch.float64)
        if args.time_sampling == "uniform":
            return torch.tensor([g.random() for g in drawn], dtype=torch.float64) * end
        normal = torch.tensor([g.standard_normal() for g in drawn], dtype=torch.float64)
        return torch.sigmoid(args.time_mean + args.time_std * normal) * end

    def _conditioning(self, rows: Tensor, numbers: Sequence[int], step: int, sides: int) -> Conditioning:
        """A row per image, all first sides first; some prompts are left out, for both images of a pair."""
        examples = self.examples
        texts = [examples.texts[i] for i in rows.tolist()]
        dropped = [self.noise.generator("dropout", step, n).random() < self.args.prompt_dropout for n in numbers]
        parts = [self.encoded.empty if gone else self.encoded([t]) for t, gone in zip(texts, dropped, strict=True)]
        conditioning = Conditioning.cat(parts * sides)
        if examples.sizes is None:
            return conditioning
        told = [examples.sizes[i][side] for side in range(sides) for i in rows.tolist()]
        columns = (
            torch.tensor([getattr(s, n) for s in told]) for n in ("original_size", "crop_top_left", "target_size")
        )
        return self.model.with_sizes(conditioning, *columns)

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
        plain: dict[str, Any] = {"reward_shift": self.reward_shift.state_dict(), "warned": self.warned}
        if self.auto_beta is not None:
            plain["auto_beta"] = self.auto_beta.state_dict()
        if isinstance(self.source, StreamSource):
            plain["cursor"] = self.source.cursor.state()
        return tensors, plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        if self.reference is not None:
            restore(self.reference.shadow, tensors)
        if self.auto_beta is not None:
            self.auto_beta.load_state_dict(plain["auto_beta"])
        self.reward_shift.load_state_dict(plain["reward_shift"])
        self.warned = plain["warned"]
        if isinstance(self.source, StreamSource):
            self.source.resume(Cursor(**plain["cursor"]))

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
            raise RuntimeError(
                f"policy and reference differ by {worst:.2e} before the first update: dropout or another source of "
                "randomness in the denoiser is on; turn it off"
            )

    @torch.no_grad()
    def after_first_update(self) -> None:
        """The canary: an update must have changed what the denoiser says."""
        now, _ = self.denoise(torch.arange(len(self.tracked[0].output)), 0)
        same = all(torch.equal(a.output, b.output) for a, b in zip(now, self.tracked, strict=True))
        if same and self.examples.weight.any():
            raise RuntimeError(
                "the first update changed nothing in the denoiser's output: the trained weights are not part of it "
                "(check lora.targets), or learning_rate is too small for this precision"
            )


def sampled_digest(data: Samples) -> str:
    """Of the number of samples, and of a few of them: enough to notice other data, and quick for millions."""
    count = len(data)
    chosen = min(count, DIGESTED)
    few = [data[number * count // chosen] for number in range(chosen)]
    return digest([str(count), *(text for sample in few for text in (sample.key, sample.prompt.text))])


def single_metrics(image: Denoised, liked: Tensor) -> dict[str, Tensor]:
    """Figures of single images, detached and 0-dim; sides that are not there count 0."""
    with torch.no_grad():
        values = {"error": image.error}
        if image.reference is not None:
            gain = image.gain
            values["gain"] = gain
        sides = {"liked": liked, "disliked": ~liked}
        figures = {
            f"{side}_{name}": (chosen * value).sum() / chosen.sum().clamp(min=1)
            for side, chosen in sides.items()
            for name, value in values.items()
        }
        if image.reference is not None:
            right = torch.where(liked, gain > 0, gain < 0)
            figures["accuracy"] = share(right) + share(gain == 0) / 2
    return figures


def _kto_context(trainer: DiffusionDPOTrainer, image: Denoised, liked: Tensor) -> dict[str, Tensor]:
    return {"kl": trainer.accelerator.reduce(reference_point(image), "mean")}


def _bco_context(trainer: DiffusionDPOTrainer, image: Denoised, liked: Tensor) -> dict[str, Tensor]:
    rewards = trainer.beta * image.gain.detach()
    everyone = trainer.accelerator.gather(torch.stack([rewards, liked.to(rewards)]).T.contiguous())
    return {"shift": trainer.reward_shift.update(everyone[:, 0], everyone[:, 1] > 0.5)}


# What a loss of single images needs to know of the batch on all processes.
CONTEXT: dict[str, Callable[[DiffusionDPOTrainer, Denoised, Tensor], dict[str, Tensor]]] = {
    "kto": _kto_context,
    "bco": _bco_context,
}
