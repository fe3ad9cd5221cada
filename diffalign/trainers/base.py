"""Base trainer: load the model, make it trainable, and run the loop on an algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator

from diffalign.data.prompts import as_prompts
from diffalign.fsdp import FSDPConfig
from diffalign.log import get_logger
from diffalign.models import DiffusionModel, load_model
from diffalign.models.load import loaded_commit
from diffalign.models.offload import PARTS
from diffalign.models.performance import set_performance
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rewards.base import Reward, RewardFunction, check_latents
from diffalign.rewards.support.probe import try_rewards
from diffalign.rng import KeyedRNG
from diffalign.runtime.callbacks import TrainerCallback
from diffalign.runtime.loop import Loop
from diffalign.runtime.output_copy import OutputCopy
from diffalign.runtime.run import Heartbeat, Run
from diffalign.runtime.state import LoopState
from diffalign.runtime.trainer_config import TrainerConfig
from diffalign.runtime.watchdog import Watchdog
from diffalign.structures import Prompt
from diffalign.trainers.algorithm import Algorithm
from diffalign.trainers.announce import closing, opening
from diffalign.trainers.connect import connected
from diffalign.trainers.hub import hub_callbacks
from diffalign.trainers.inputs import Inputs, load_optional, with_held_out
from diffalign.trainers.outputs import Outputs
from diffalign.trainers.result import TrainingResult, read_result

logger = get_logger(__name__)
C = TypeVar("C", bound=TrainerConfig)
Prompts = Iterable[Prompt | str | Mapping[str, Any]]


class Trainer(Generic[C]):
    """Train a model with an algorithm.

    Args:
        model: A path, a hub id or a ``DiffusionModel``; default: ``args.model``.
        args: The configuration; default: that of the algorithm.
        reward_funcs: Rewards (names, functions or instances), alone, in a list, or as a mapping from reward name to
            weight where names are registered; default: ``args.rewards``.
        train_dataset: Training data in memory; default: the files that ``args`` names. Prompts are a list of
            ``Prompt``, texts or rows, or a ``datasets.Dataset``.
        eval_dataset: Held-out prompts, likewise; default: ``args.eval_prompts``.
        callbacks: Called on steps, evaluations and checkpoints, in order.

    Attributes:
        run: What the training shares.
        algorithm: The algorithm.
        loop: The loop that trains it.
        output_copy: Copies the run folder elsewhere.
        outputs: Evaluations and exports.

    Raises:
        ValueError, FileNotFoundError: Before any work, if something is missing or does not fit.
    """

    algorithm_class: ClassVar[type[Algorithm[Any, Any]]]

    def __init__(
        self,
        model: str | Path | DiffusionModel | None = None,
        args: C | None = None,
        reward_funcs: str | RewardFunction | Reward | Sequence[Any] | Mapping[str, float] | None = None,
        train_dataset: Any = None,
        eval_dataset: Prompts | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        kind = self.algorithm_class
        config = with_model_name(args or kind.config_class(), model)
        if config.memory:
            raise ValueError(
                f"memory {config.memory}: `diffalign train` chooses settings for it; in Python, first call "
                "args, _ = diffalign.forecast.fit.fit_memory(find_algorithm(NAME), args)"
            )
        self.inputs: Inputs[C] = with_evaluation(kind.read_inputs(config, reward_funcs, train_dataset), eval_dataset)
        accelerator, shards = connected(self.inputs.config, self._check_processes)
        loaded = model if isinstance(model, DiffusionModel) else load(self.inputs.config)
        check_latents({**self.inputs.eval_rewards, **self.inputs.rewards}, loaded.pipeline.vae.config)
        self.inputs = inputs = record_model(self.inputs, loaded)

        config = inputs.config
        place(loaded, config, accelerator, shards)
        trained = kind.make_trainable(loaded, config, shards)
        set_performance(loaded, config.attention, config.mixed_precision, config.compile)
        state = LoopState(trained, config, accelerator)
        if trained is loaded.raw_denoiser:
            loaded.denoiser = state.module
        else:  # only its precision matters: what does not train needs no wrapper that shares gradients
            loaded.denoiser = accelerator.prepare_model(loaded.raw_denoiser, evaluation_mode=True)

        self.run: Run[C] = Run(
            config,
            loaded,
            state.module,
            accelerator,
            KeyedRNG(config.seed),
            PromptEmbeddingCache(loaded, folder=config.cache_folder),
            state.progress,
            Heartbeat(accelerator, Watchdog(config.hang_timeout, config.output_dir)),
        )
        self.algorithm = kind(self.run, inputs)
        self.outputs = Outputs(self.run, inputs, self.algorithm, state.ema, even=shards is not None)
        target = config.output_copy if self.run.is_main else None
        self.output_copy = OutputCopy(config.output_dir, target, config.checkpoints_total_limit)
        every = [*callbacks, *hub_callbacks(config), self.output_copy]
        self.loop = Loop(self.run, state, self.algorithm, self.outputs, every)

    def _check_processes(self, processes: int, shards: FSDPConfig | None) -> None:
        """Raise ValueError where the run cannot be sharded, or its batches do not divide over the processes."""
        if shards is not None:
            self.inputs.config.validate_shards()
        self.algorithm_class.check_processes(self.inputs, processes)

    @property
    def args(self) -> C:
        """The configuration of the run."""
        return self.run.config

    @property
    def model(self) -> DiffusionModel:
        """The model."""
        return self.run.model

    def train(self) -> TrainingResult:
        """Train to ``max_train_steps``; write the LoRA, the model card, curves and a base-versus-tuned grid.

        Returns:
            The figures, and the paths of what was written.
        """
        self.model.about = self.outputs.about()
        logger.info(opening(self.run, self.inputs, self.loop.state.parameters))
        with self.output_copy:
            self.loop.train()
        if self.outputs.report.paths:
            logger.info(closing(self.outputs.report))
        return read_result(self.run.config.output_dir, self.run.progress.step)


def with_model_name(config: C, model: str | Path | DiffusionModel | None) -> C:
    """Return the configuration with the name of a model passed as an argument, and an absolute ``output_dir``."""
    # Rewards may change the working folder.
    config = dataclasses.replace(config, output_dir=config.output_dir.absolute())
    if isinstance(model, DiffusionModel):
        name = model.pipeline.config.get("_name_or_path") or "model"
        return config if config.model else dataclasses.replace(config, model=str(name))
    return config if model is None else dataclasses.replace(config, model=str(model))


def with_evaluation(inputs: Inputs[C], eval_dataset: Prompts | None) -> Inputs[C]:
    """Add the held-out prompts, and try the rewards that only evaluations use. Raises ValueError without a reward."""
    config = inputs.config
    given = None if eval_dataset is None else as_prompts(eval_dataset, "eval_dataset")
    prompts = load_optional(config.eval_prompts) if given is None else given
    if not prompts:
        return inputs
    inputs = with_held_out(inputs)
    if not inputs.eval_rewards:
        raise ValueError("eval_rewards is missing: name the rewards that judge the held-out images")
    tried = {id(reward) for reward in inputs.rewards.values()}
    new = {name: reward for name, reward in inputs.eval_rewards.items() if id(reward) not in tried}
    try_rewards(new, prompts, config.resolution, leave=True)
    return dataclasses.replace(inputs, eval_prompts=prompts)


def load(config: TrainerConfig) -> DiffusionModel:
    """Load the model that a configuration names."""
    return load_model(
        config.model,
        revision=config.revision,
        dtype=config.base_dtype,
        quantise=config.quantise,
        max_sequence_length=config.max_sequence_length,
        resolution=config.resolution,
        embedded_guidance=config.embedded_guidance,
    )


def record_model(inputs: Inputs[C], model: DiffusionModel) -> Inputs[C]:
    """Record in the configuration what the model decides, so that config.yaml holds it: commit and guidance scale."""
    config = inputs.config
    if (known := loaded_commit(model)) is not None:
        config = dataclasses.replace(config, revision=known)  # a branch may move
    if config.guidance_scale is None:
        config = dataclasses.replace(config, guidance_scale=model.unguided_scale)
    model.guides(config.guidance_scale)  # refuses a scale that the pipeline cannot apply
    return dataclasses.replace(inputs, config=config)


def place(model: DiffusionModel, config: TrainerConfig, accelerator: Accelerator, shards: FSDPConfig | None) -> None:
    """Move the model to its device, and turn on gradient checkpointing."""
    # A denoiser that will be sharded need not fit on one device.
    parts = [part for part in config.offload if part in PARTS]  # rewards move by themselves
    model.to_device(accelerator.device, parts, denoiser=shards is None)
    # Gradient checkpointing recomputes blocks outside the attention context, so do not set one.
    slow = accelerator.device.type == "cpu" and config.mixed_precision == "bf16"
    model.plain_attention = slow and not config.gradient_checkpointing
    if config.gradient_checkpointing:
        model.raw_denoiser.enable_gradient_checkpointing()
