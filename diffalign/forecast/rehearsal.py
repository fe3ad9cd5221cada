"""Rehearse an iteration of a run on fake tensors: memory by phase, evaluations and operations, without weights.

The run's own algorithm samples, decodes, computes losses and gradients and steps its optimizer. Passes that are alike
are run once.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.forecast.counter import BLOCK, Counter
from diffalign.forecast.fake_model import fake_model, offload
from diffalign.forecast.fake_rewards import RehearsedReward
from diffalign.forecast.stand_ins import (
    LONG,
    FakeNoise,
    FakePrompts,
    FiniteValues,
    OneOfMany,
    cuda_autocast,
    first_gradients,
    first_slices,
    one_pair,
    remember,
)
from diffalign.fsdp import units
from diffalign.models import DiffusionModel
from diffalign.models.editing import example_prompt
from diffalign.models.meta_device import model_on_meta
from diffalign.models.offload import PARTS, VAE, tensors_of
from diffalign.models.quiet import quiet_libraries
from diffalign.models.weight_memory import ADAMW_MOMENTS, Spread, gathered_bytes, size_of
from diffalign.rewards.support.probe import untried
from diffalign.rollout.generate import NoiseKeys, decode, generate_latents
from diffalign.rollout.scoring import score
from diffalign.runtime.interfaces import MicroBatch
from diffalign.runtime.oom import batch_name
from diffalign.runtime.run import Heartbeat, Run
from diffalign.runtime.state import LoopState
from diffalign.runtime.watchdog import Watchdog
from diffalign.trainers.algorithm import Algorithm
from diffalign.trainers.inputs import Inputs, with_held_out
from diffalign.trainers.registry import Entry

WEIGHTS, SAMPLING, SCORING, TRAINING, STEPPING, EVALUATING = "weights", "sample", "score", "train", "step", "held out"
HELD_OUT = "held-out prompt"
ENCODE, DECODE, EVALUATE, BACKWARD = "encode", "decode", "evaluate", "backward"
NOT_FAKE = (NotImplementedError, RuntimeError, AssertionError)  # errors of code that does not run on fake tensors


@dataclass(frozen=True)
class Rehearsed:
    """Memory and operations of one process in an iteration.

    Attributes:
        peaks: (phase, part) -> largest number of bytes on the device at a time.
        flops: (phase, part) -> floating-point operations; for the phase "train" those of one optimizer step.
        traffic: (phase, part) -> bytes read and written.
        calls: (phase, part) -> number of images, or prompts, that the part was called with.
        updates: Optimizer steps of an iteration.
        latent_numbers: Number of elements of an image's latents.
        notes: Lines about what was not rehearsed.
    """

    peaks: Mapping[tuple[str, str], int]
    flops: Mapping[tuple[str, str], int]
    traffic: Mapping[tuple[str, str], int]
    calls: Mapping[tuple[str, str], int]
    updates: int
    latent_numbers: int
    notes: Sequence[str] = ()

    @property
    def peak(self) -> int:
        """Largest number of bytes at a time."""
        return max(self.peaks.values())

    @property
    def peak_at(self) -> tuple[str, str]:
        """Phase and part with the peak."""
        return max(self.peaks, key=lambda where: self.peaks[where])

    def peak_of(self, phase: str) -> int:
        """Return the largest number of bytes of a phase."""
        return max((size for (where, _), size in self.peaks.items() if where == phase), default=0)

    def total(self, table: Mapping[tuple[str, str], int], phase: str) -> int:
        """Sum a table over the parts of a phase."""
        return sum(count for (where, _), count in table.items() if where == phase)


def rehearse(
    entry: Entry, config: Any, world: int = 1, spread: Spread | None = None, *, block: int = BLOCK, cpu: bool = False
) -> Rehearsed:
    """Rehearse an iteration of a run, not its first one: the optimizer has its moments.

    Args:
        entry: The algorithm.
        config: Its validated configuration.
        world: Number of processes, of which this is one.
        spread: Sharding of the denoiser, whose savings are computed from its sizes; None without.
        block: Bytes to which the allocator rounds up.
        cpu: Whether the run is on a CPU, which chooses other precisions and offloads nothing.

    Raises:
        ValueError: The run is refused, as it would be.
    """
    counter = Counter(block)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(untried())
        stack.enter_context(quiet_libraries())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # weight sets compare addresses
        if not cpu:
            stack.enter_context(cuda_autocast())
        stack.enter_context(FiniteValues())
        stack.enter_context(first_slices(counter))
        stack.enter_context(first_gradients(counter))
        setting = _setting(entry, config, world, folder, counter)
        model, trained = _model(entry, setting, counter, cpu)
        stack.enter_context(counter)
        with counter.during(WEIGHTS):
            algorithm, state = _algorithm(entry, setting, model, trained, counter, folder)
            warm_up(state, counter, config)
            if spread is not None:
                _shard(model, state, spread, counter)
            for reward in setting.every:
                reward.prepare(model.default_resolution)
            counter.restart()
        if setting.inputs.eval_prompts:  # which are encoded once, by the evaluation before the first iteration
            with counter.during(EVALUATING):
                algorithm.run.prompts.rows([example_prompt(model, HELD_OUT).input])
        with counter.during(SAMPLING):
            batch = algorithm.sample(0)
        for reward in setting.rewards:
            reward.release()
        with counter.during(SCORING):
            algorithm.score(batch)
            algorithm.advantage(batch)
        _update(algorithm, state, batch, counter, spread)
        del batch
        if setting.inputs.eval_prompts:
            with counter.during(EVALUATING):
                _evaluate(algorithm, setting.inputs)
        updates = algorithm.updates_per_iteration
    peaks, flops, traffic, calls = (
        {key: value for key, value in table.items() if key[0]}
        for table in (counter.peaks, counter.flops, counter.traffic, counter.calls)
    )
    numbers = torch.Size(model.latent_shape()).numel()
    notes = tuple(note for reward in setting.every if (note := reward.note) is not None)
    return Rehearsed(peaks, flops, traffic, calls, updates, numbers, notes)


@dataclass(frozen=True)
class _Setting:
    """Inputs of a rehearsal, with replacements of data and rewards."""

    inputs: Inputs[Any]
    accelerator: OneOfMany
    rewards: Sequence[RehearsedReward]

    @property
    def every(self) -> Sequence[RehearsedReward]:
        """The rewards that the run trains on, and those of evaluations alone."""
        judges: Mapping[str, Any] = self.inputs.eval_rewards if self.inputs.eval_prompts else {}
        return list({id(reward): reward for reward in (*self.rewards, *judges.values())}.values())


def _setting(entry: Entry, config: Any, world: int, folder: Path, counter: Counter) -> _Setting:
    """Read the inputs of a run; data are replaced by one pair of images, and prompts by as many as are needed."""
    kind, shape = entry.algorithm, model_on_meta(config.model, resolution=config.resolution)
    config = replace(config, output_dir=folder, cache=False, compile=False, attention="native", report_to="none")
    config = replace(config, optimizer="adamw", cache_dir=None)  # bitsandbytes needs a GPU
    if getattr(config, "save_rollouts", False):
        config = replace(config, save_rollouts=False)
    if config.guidance_scale is None:
        config = replace(config, guidance_scale=shape.unguided_scale)
    for name in ("train_data", "train_images"):
        if getattr(config, name, ()):
            pair = (str(one_pair(folder, shape.default_resolution)),)
            config = replace(config, **{name: pair, "data": type(config.data)()})
    if getattr(config, "streaming", False):
        config = replace(config, streaming=False)
    prompts = None
    if getattr(config, "train_prompts", None):
        prompts = [example_prompt(shape, f"{number} {LONG}") for number in range(config.num_groups)]

    # One is enough: evaluations are not rehearsed, and early stopping only asks whether there are any.
    held_out = [example_prompt(shape, HELD_OUT)] if config.eval_prompts else []
    inputs = replace(with_held_out(kind.read_inputs(config, None, prompts)), eval_prompts=held_out)
    kind.check_processes(inputs, world)
    overlaps = getattr(config, "overlap_rewards", False)
    fakes = {name: RehearsedReward(name, reward, counter, overlaps) for name, reward in inputs.rewards.items()}
    judges = {
        name: fakes.get(name) or RehearsedReward(name, reward, counter, trained=False)
        for name, reward in inputs.eval_rewards.items()
    }
    inputs = replace(inputs, rewards=fakes, eval_rewards=judges)
    return _Setting(inputs, OneOfMany(config.mixed_precision, world), tuple(fakes.values()))


def _model(entry: Entry, setting: _Setting, counter: Counter, cpu: bool) -> tuple[DiffusionModel, nn.Module]:
    config = setting.inputs.config
    recipe = getattr(config, "recipe", None)
    late = recipe is not None and recipe.resolve().negative
    make = partial(entry.algorithm.make_trainable, config=config, shards=None)
    model, trained = fake_model(config, counter.fake, make, late)
    if config.gradient_checkpointing:
        model.raw_denoiser.enable_gradient_checkpointing()
    model.plain_attention = cpu and config.mixed_precision == "bf16" and not config.gradient_checkpointing
    if not cpu:
        offload(model, [part for part in config.offload if part in PARTS])

    away = [t for part in model.offloaded.values() for t in tensors_of(part.networks)]
    parts = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
    counter.leave_out(away)
    with counter.during(WEIGHTS):
        counter.hold(tensors_of(parts))
        counter.hold(tensor for kept in model.weights.copies.values() for tensor in kept)
    remember(model, counter)
    return model, trained


def _algorithm(
    entry: Entry, setting: _Setting, model: DiffusionModel, trained: nn.Module, counter: Counter, folder: Path
) -> tuple[Algorithm[Any, Any], LoopState]:
    config, accelerator = setting.inputs.config, setting.accelerator
    state = LoopState(trained, config, accelerator)
    model.denoiser = state.module if trained is model.raw_denoiser else accelerator.prepare_model(model.raw_denoiser)
    run = Run(
        config,
        model,
        state.module,
        accelerator,
        FakeNoise(config.seed, counter),
        FakePrompts(model),
        state.progress,
        Heartbeat(accelerator, Watchdog(0, folder)),
    )
    return entry.algorithm(run, setting.inputs), state


def warm_up(state: LoopState, counter: Counter, config: Any) -> None:
    """Let the optimizer make its moments; in 8 bits they take a quarter."""
    for parameter in state.parameters:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if config.optimizer == "adamw_8bit":
        counter.add(-_moments(state) * 3 // 4)


def _moments(state: LoopState) -> int:
    return sum(size_of(p) for p in state.parameters) * ADAMW_MOMENTS


def _shard(model: DiffusionModel, state: LoopState, spread: Spread, counter: Counter) -> None:
    """Leave a share of the denoiser's weights, moments and gradients; the units that run are gathered meanwhile."""
    weights = list(model.raw_denoiser.parameters())
    kept = [tensor for copy in model.weights.copies.values() for tensor in copy]
    averages = [] if state.ema is None else state.ema.shadow
    tensors = {id(tensor): size_of(tensor) for tensor in (*weights, *kept, *averages)}
    held = sum(tensors.values()) + _moments(state)
    counter.add(spread.share(held) - held)

    # FSDP2 receives a unit in one buffer, and copies it to the parameters; gradients take the same way back.
    parts = [parameters for _, parameters in units(model.raw_denoiser)]
    buffer = max(sum(map(size_of, part)) for part in parts)
    sent = max(sum(size_of(p) for p in part if p.requires_grad) for part in parts)
    gathered = gathered_bytes(model.raw_denoiser) + buffer
    reduced = 2 * sent + spread.share(sent)
    counter.gathered[EVALUATE] = gathered
    counter.gathered[BACKWARD] = (sum(map(size_of, weights)) if spread.keep else gathered) + reduced


def _prepare_gradients(state: LoopState, several: bool, spread: Spread | None, counter: Counter) -> None:
    """Make gradients that several passes add to; of sharded ones a share stays once they are whole."""

    def share(parameter: Tensor) -> None:
        if spread is not None:
            counter.add(spread.share(size_of(parameter)) - size_of(parameter))

    for parameter in state.parameters:
        if several:
            parameter.grad = torch.zeros_like(parameter)
            share(parameter)
        elif spread is not None:
            parameter.register_post_accumulate_grad_hook(share)


def _update(algorithm: Any, state: LoopState, batch: Any, counter: Counter, spread: Spread | None) -> None:
    """Take an optimizer step; of passes that are alike one is run, and adds to gradients if there are several.

    The operations of the others are those of the one that was run, per row.
    """
    minibatch = next(algorithm.minibatches(batch, 0))
    rows: dict[Hashable, list[int]] = {}
    chosen: dict[Hashable, MicroBatch] = {}
    for micro in minibatch.micros:
        key = algorithm.pass_kind(micro)
        rows.setdefault(key, []).append(len(micro.rows))
        if key not in chosen or len(micro.rows) > len(chosen[key].rows):
            chosen[key] = micro

    with counter.during(TRAINING):
        _prepare_gradients(state, len(minibatch.micros) > 1, spread, counter)
        with algorithm.updating():
            for key, micro in chosen.items():
                with counter.repeated(sum(rows[key]) / len(micro.rows)):
                    loss, _ = algorithm.loss(micro)
                    with counter.within(BACKWARD):
                        (loss * micro.weight).backward()
                    del loss
        torch.nn.utils.clip_grad_norm_(state.parameters, algorithm.config.max_grad_norm)
    with counter.during(STEPPING):
        state.step(None, torch.nan)


def _evaluate(algorithm: Algorithm[Any, Any], inputs: Inputs[Any]) -> None:
    """Sample and score a batch of held-out images as an evaluation does."""
    images, latents = _held_out(algorithm, inputs.config)
    prompts = [example_prompt(algorithm.model, f"{HELD_OUT} {number}") for number in range(len(images))]
    judges: Mapping[str, Any] = inputs.eval_rewards
    for name, reward in judges.items():
        score({name: reward}, images, prompts, latents=latents)
        reward.release()


def _held_out(algorithm: Algorithm[Any, Any], config: Any) -> tuple[Tensor, Tensor]:
    """Sample and decode a batch of held-out images: images and final latents."""
    run, model = algorithm.run, algorithm.model
    size = getattr(config, batch_name(config, "evaluate"))
    own = torch.zeros(size, dtype=torch.long)
    keys = NoiseKeys(run.rng, "evaluation", 0, own, torch.arange(size))
    conditioning = run.prompts.rows([example_prompt(run.model, HELD_OUT).input])
    with torch.no_grad(), model.keeping(VAE):
        for _, latents in generate_latents(model, algorithm.eval_plan(), conditioning, own, keys, size):
            images = decode(model, latents)
    return images, latents
