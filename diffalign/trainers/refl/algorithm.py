"""ReFL (arXiv 2304.05977) and its relatives: a reward's own gradient, through the image, into the denoiser.

An optimizer step takes ``num_groups`` prompts and ``group_size`` images of each. Batches of them are sampled without
gradients to a step that the recipe draws; from there a few calls of the denoiser are recorded, the result is decoded
and scored, and the gradient is propagated back. Which calls, and what is scored, is a row of
``diffusion.reward_gradient_presets.PRESETS``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.data.buckets import Size
from diffalign.fsdp import FSDPConfig, is_sharded
from diffalign.log import get_logger
from diffalign.models import DiffusionModel
from diffalign.models.editing import check_sources
from diffalign.models.offload import VAE
from diffalign.models.performance import checkpoint_decoder
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.weights import unload
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.generate import NoiseKeys
from diffalign.rollout.sampler import SamplingPlan, micro_batches, ode_plan
from diffalign.rollout.scoring import RewardWarning, check_unscored
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.interfaces import IterationBatch, Metrics, MicroBatch, MiniBatch, State
from diffalign.runtime.provenance import digest
from diffalign.runtime.run import Run
from diffalign.structures import Input, Level, Prompt
from diffalign.trainers.algorithm import Algorithm, Evaluated
from diffalign.trainers.base import Trainer
from diffalign.trainers.contents import check_sample_sources, sample_contents
from diffalign.trainers.inputs import (
    Inputs,
    check_differentiable,
    dataset,
    evaluation_rewards,
    read_rewards,
)
from diffalign.trainers.refl.config import ReFLConfig
from diffalign.trainers.refl.cost import COST
from diffalign.trainers.refl.hacking_monitor import HackingMonitor
from diffalign.trainers.refl.initial_states import (
    Batch,
    BufferStarts,
    ImageStarts,
    NoiseStarts,
    Pictures,
    Starts,
    advance,
    draw_courses,
    places,
    sampling_plan,
)
from diffalign.trainers.refl.reward_gradient import RecipeGuidance, RewardGradient
from diffalign.trainers.refl.reward_loss import Judge, thresholds
from diffalign.trainers.registry import register_algorithm

logger = get_logger(__name__)

TRIAL = {
    "train_prompts": "{assets}/prompts/shapes_train.jsonl",
    "rewards": {
        "pickscore": {"options": {"path": "{assets}/judges/pickscore", "tokenizer": "{assets}/judges/pickscore"}}
    },
    "num_groups": 4,
    "rollout_batch_size": 4,
    "train_batch_size": 4,
    "recipe": {"preset": "draft_1", "num_steps": 4},
}


@dataclass
class PathBatches(IterationBatch):
    """This process's samples of an iteration, in batches that share gradient paths."""

    parts: list[Batch] = field(default_factory=list)

    def ids(self, rows: Tensor) -> list[dict[str, Any]]:
        """Return prompt, group and sample index of each image of the iteration."""
        return [
            {"prompt": prompt.text, "group": group, "member": sample}
            for part in self.parts
            for prompt, (group, sample) in zip(part.prompts, part.samples, strict=True)
        ]


@register_algorithm("refl", config=ReFLConfig, cost=COST, trial=TRIAL)
class ReFL(Algorithm[ReFLConfig, PathBatches]):
    """Gradients of differentiable rewards through a few recorded calls of the denoiser."""

    grad_through = (VAE,)
    collapse_remedy = "Train less far: set early_stopping, or half the learning_rate from an earlier checkpoint."

    @classmethod
    def read_inputs(cls, config: ReFLConfig, reward_funcs: Any, train_dataset: Any) -> Inputs[ReFLConfig]:
        """Validate the configuration, and read rewards and prompts."""
        config.validate()
        config, rewards, weights = read_rewards(config, reward_funcs)
        check_differentiable(rewards)
        recipe = config.recipe.resolve()
        thresholds(recipe, rewards, config.thresholds)
        prompts = None
        if not (config.train_rollouts or recipe.from_images):
            prompts = dataset(train_dataset, config.train_prompts, "train_prompts")
        try_rewards(rewards, prompts or (), config.resolution)
        judges = evaluation_rewards(config.eval_rewards, rewards, config.allow_reward_code)
        return Inputs(config, prompts, rewards, weights, {**judges, **rewards})

    @classmethod
    def check_processes(cls, inputs: Inputs[ReFLConfig], processes: int) -> None:
        """Raise ValueError where images or groups do not divide over the processes."""
        inputs.config.validate_batches(processes)

    @classmethod
    def keeps_reference(cls, config: ReFLConfig) -> bool:
        """Return whether the base model regularises, or takes the first steps of evaluations."""
        return config.recipe.resolve().regulariser == "reference" or bool(config.base_share)

    @classmethod
    def make_trainable(cls, model: DiffusionModel, config: ReFLConfig, shards: FSDPConfig | None) -> nn.Module:
        """Make the denoiser trainable, or a negative prompt if the recipe trains one."""
        recipe, scale = config.recipe.resolve(), config.guidance_scale
        if not model.guides(scale):
            off = f"guidance_scale {scale:g} does not guide this model"
            if recipe.negative:
                least = model.unguided_scale
                raise ValueError(f"a negative prompt acts by guidance, and {off}: give one above {least:g}")
            if recipe.compensate:
                raise ValueError(f"recipe.compensate divides by a guidance that is off ({off}): leave it out")
        if not recipe.negative:
            return super().make_trainable(model, config, shards)
        if shards is not None:
            raise ValueError("FSDP2 does not train a negative prompt, whose denoiser stays as it is: use ddp.yaml")
        return model.train_negative()

    def __init__(self, run: Run[ReFLConfig], inputs: Inputs[ReFLConfig]) -> None:
        super().__init__(run, inputs)
        config, recipe = run.config, run.config.recipe.resolve()
        if config.vae_checkpointing and not checkpoint_decoder(vae := self.model.pipeline.vae):
            logger.warning(f"vae_checkpointing has no effect: the layers of {type(vae).__name__} cannot be recomputed")
        bounds = thresholds(recipe, inputs.rewards, config.thresholds)
        size, dtype = config.decode_slice, config.decode_dtype
        self.judge = Judge(self.model, inputs.rewards, inputs.weights, bounds, recipe, size, dtype)
        self.recipe = recipe
        self.levels = self.model.levels(recipe.num_steps, config.schedule)
        self._levels: dict[Size, Level] = {}  # of other sizes
        self.pictures = self._pictures()
        self.starts = self._starts(inputs.data)
        self.guidance = RecipeGuidance(run, recipe)
        self.gradient = RewardGradient(run, self.judge, recipe, self.guidance, self.levels_at, self.pictures)
        self.monitor = HackingMonitor(run, inputs)
        if self.pictures is not None:
            check_sample_sources(run.model, self.pictures.data)
            self.data_contents = {"samples of train_images": sample_contents(self.pictures.data)}
        self.data_digest = digest([prompt.text for prompt in inputs.data or ()])

    def _pictures(self) -> Pictures | None:
        config = self.config
        if not config.train_images:
            return None
        return Pictures(self.run, config.num_groups)

    def _starts(self, prompts: Sequence[Prompt] | None) -> Starts:
        config, recipe, rng, shape = self.config, self.recipe, self.run.rng, self.model.latent_shape()
        if config.train_rollouts:
            return BufferStarts(
                config.train_rollouts, config.num_groups, config.group_size, rng, shape, recipe.num_steps
            )
        if recipe.from_images:
            assert self.pictures is not None
            return ImageStarts(self.pictures, self.levels_at, recipe.first)
        assert prompts is not None
        check_sources(self.model, prompts)
        return NoiseStarts(prompts, config.num_groups, rng, shape)

    # An iteration ---------------------------------------------------------------------------------------------------

    def sample(self, iteration: int) -> PathBatches:
        """Sample this process's images up to the steps that their gradient paths need."""
        started, config, run = time.perf_counter(), self.config, self.run
        total = config.num_groups * config.group_size
        own = [divmod(index, config.group_size) for index in run.share(total)]
        unload()  # the rewards' networks, which the last update used
        batch, sharded = PathBatches(), is_sharded(self.model.raw_denoiser)
        run.prompts.prepare(self._inputs(iteration, own))

        with self.model.keeping(VAE):
            for rows in micro_batches(len(own), config.rollout_batch_size):
                run.heartbeat(collective=True)
                # Processes that gather weights together need gradient paths of one length.
                lead = divmod(rows.start, config.group_size) if sharded else own[rows.start]
                batch.parts.append(self._part(iteration, own[rows], lead))
        batch.metrics = {"images_per_second": total / (time.perf_counter() - started)}
        return batch

    def _inputs(self, iteration: int, samples: Sequence[tuple[int, int]]) -> list[Input]:
        """Return all prompts that an iteration encodes, its update included."""
        inputs = self.starts.inputs_of(iteration, samples)
        if self.recipe.regulariser == "pretraining":
            assert self.pictures is not None
            inputs += self.pictures.inputs_of(iteration, [group for group, _ in samples])
        return inputs

    def _part(self, iteration: int, samples: Sequence[tuple[int, int]], lead: tuple[int, int]) -> Batch:
        """Sample a batch up to its gradient paths. lead: the sample whose random numbers choose the paths."""
        paths = draw_courses(self.recipe, self.run.rng, iteration, lead)
        kept = places(paths, self.recipe.num_steps)
        start = self.starts(iteration, samples, kept[0])
        conditioning = self.run.prompts(self.starts.inputs_of(iteration, samples))
        if start.size is not None:
            conditioning = self.model.at_size(conditioning, start.size)
        plan = sampling_plan(self.recipe)
        group, sample = torch.tensor(samples).T
        buffer = RolloutBuffer.allocate(
            plan, group, sample, start.prompts, start.x.shape[1:], device=self.model.device, steps=kept
        )

        keys, shape = NoiseKeys(self.run.rng, "refl", iteration, group, sample), tuple(start.x.shape[1:])
        draw = lambda index: keys.step(shape, index)  # noqa: E731
        sampling = SamplingPlan(plan, self.levels_at(start.size), self.guidance.plain)
        advance(self.model, sampling, conditioning, start, buffer, draw)
        return Batch(paths, samples, start.prompts, conditioning, buffer, iteration, start.size)

    def levels_at(self, size: Size | None) -> Level:
        """Return the recipe's noise levels for images of a size: schedulers may shift with it. None: the model's."""
        if size is None or size == self.model.default_resolution:
            return self.levels
        if size not in self._levels:
            self._levels[size] = self.model.levels(self.recipe.num_steps, self.config.schedule, size)
        return self._levels[size]

    def minibatches(self, batch: PathBatches, iteration: int) -> Iterator[MiniBatch]:
        """Yield the one optimizer step of an iteration: a pass per gradient path and part of a batch."""
        total = sum(len(part.samples) for part in batch.parts)
        micros = []
        for part in batch.parts:
            for rows in torch.arange(len(part.samples)).split(self.config.train_batch_size):
                weight = len(rows) / (total * len(part.courses))
                micros += [MicroBatch(rows, weight, part, path) for path in range(len(part.courses))]
        yield MiniBatch(micros, torch.arange(total))

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some samples on one gradient path, and metrics."""
        return self.gradient(micro.data, micro.rows, micro.tag)

    def pass_kind(self, micro: MicroBatch) -> Hashable:
        """Return the calls along the gradient path, recorded and not."""
        moves = micro.data.courses[micro.tag].moves
        return len(moves), sum(move.gradient for move in moves)

    def on_step(self, batch: PathBatches, metrics: Metrics) -> None:
        """Warn about rewards that failed. Raises ValueError if they failed on too many images."""
        if failures := self.judge.failures(some=metrics["unscored"] > 0):
            warnings.warn(failures, RewardWarning, stacklevel=2)
        if metrics["unscored"] and not all(part.buffer.x.isfinite().all() for part in batch.parts):
            raise self.run.diverged("the model's images are not finite")  # no fault of the rewards
        check_unscored(metrics["unscored"], self.config.max_unscored, extremes(self.config))

    # Checks and evaluations -----------------------------------------------------------------------------------------

    def probe(self, batch: PathBatches) -> list[Tensor]:
        """Return the outputs of the first recorded call for the first samples."""
        part = batch.parts[0]
        rows = torch.arange(min(self.config.train_batch_size, len(part.samples)))
        return [self.gradient.unrolled(part, rows, 0).calls[0].output]

    @property
    def num_steps(self) -> int:
        """Sampling steps of the recipe."""
        return self.recipe.num_steps

    def eval_plan(self) -> SamplingPlan:
        """Return how evaluations sample: with the trained negative prompt, and first steps of the base model."""
        steps = self.config.eval_num_steps or self.num_steps
        levels = self.model.levels(steps, self.config.schedule)
        return SamplingPlan(ode_plan(steps), levels, self.guidance.plain, round(self.config.base_share * steps))

    def on_evaluation(self, evaluated: Evaluated) -> Metrics:
        """Monitor reward hacking."""
        return self.monitor(evaluated, self.eval_plan())

    @property
    def done(self) -> bool:
        """Whether early stopping ends the run."""
        return self.monitor.done

    def best_weights(self) -> tuple[int, str] | None:
        """Return the best weights if early stopping kept some."""
        return self.monitor.best_weights()

    def plot(self, folder: Path) -> list[Path]:
        """Plot the monitored metrics."""
        return [self.monitor.plot(folder)]

    def state_dict(self) -> State:
        """Return the state of the hacking monitor."""
        return self.monitor.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Restore the hacking monitor."""
        self.monitor.load_state_dict(state)


class ReFLTrainer(Trainer[ReFLConfig]):
    """Train a model on the gradient of rewards, with ReFL and related methods.

    Args:
        model: A path, a hub id or a ``DiffusionModel``; default: ``args.model``.
        args: The configuration.
        reward_funcs: Differentiable rewards; as for ``FlowGRPOTrainer``.
        train_dataset: A list of ``Prompt``; default: ``args.train_prompts``.
        eval_dataset: A list of ``Prompt``; default: ``args.eval_prompts``.

    Raises:
        ValueError, FileNotFoundError: Before any work, if something is missing or does not fit.
    """

    algorithm_class = ReFL
