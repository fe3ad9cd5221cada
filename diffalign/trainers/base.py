"""Base trainer: load the model, make it trainable, run the loop, evaluate, export and report."""

from __future__ import annotations

import dataclasses
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, patch_environment
from torch import Tensor

from diffalign.evaluation.heldout import Evaluation
from diffalign.evaluation.runs import HELD_OUT
from diffalign.models import DiffusionModel, load_model
from diffalign.models.load import loaded_commit
from diffalign.models.performance import set_performance
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.models.weights import POLICY
from diffalign.rewards.base import Reward
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.weights import repositories
from diffalign.rng import KeyedRNG
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.errors import CannotTrain
from diffalign.runtime.lock import refuse_busy
from diffalign.runtime.loop import Loop, Metrics, MiniBatch
from diffalign.runtime.oom import batch_name
from diffalign.runtime.processes import check_world, connect, wants_shards
from diffalign.runtime.products import check_products, portable
from diffalign.runtime.provenance import commit
from diffalign.runtime.tracking import tracker_names
from diffalign.structures import Guidance, Level, Prompt
from diffalign.trainers.announce import closing, opening
from diffalign.trainers.arguments import load_optional
from diffalign.trainers.config import TrainerConfig
from diffalign.trainers.contents import contents
from diffalign.trainers.report import Report, consent_option, keep_prompts

EMA_SET = "ema"
Config = TypeVar("Config", bound=TrainerConfig)


def named_model(args: Config, model: str | Path | DiffusionModel | None) -> Config:
    """Return ``args`` with the name of a model passed as an argument, and an absolute ``output_dir``."""
    args = dataclasses.replace(args, output_dir=args.output_dir.absolute())  # rewards may change the working folder
    if isinstance(model, DiffusionModel):
        return args if args.model else dataclasses.replace(args, model=str(_origin(model)))
    return args if model is None else dataclasses.replace(args, model=str(model))


def _origin(model: DiffusionModel) -> str:
    return model.pipeline.config.get("_name_or_path") or "model"


class Trainer(ABC):
    """Base class of all trainers: a ``Task`` without ``collect``, ``minibatches`` and ``loss``.

    Args:
        model: A path, a hub id or a ``DiffusionModel``; None: ``args.model``.
        args: Validated configuration.
        rewards: Rewards that evaluations report, the first as accuracy.
        eval_dataset: Held-out prompts; None: those of ``args.eval_prompts``.
        keep_reference: Whether predictions of the base model will be needed.
        eval_batch_size: Images per forward pass of an evaluation.
    """

    name: ClassVar[str]
    world_size_invariant = True
    done = False  # early stopping: the loop ends as after its last step
    data_digest = ""
    data_contents: Mapping[str, dict[str, str]] = {}  # fingerprints of data in memory, by name
    grad_through: ClassVar[tuple[str, ...]] = ()  # model parts that gradients pass through

    def __init__(
        self,
        model: str | Path | DiffusionModel | None,
        args: TrainerConfig,
        rewards: Mapping[str, Reward],
        eval_dataset: Sequence[Prompt] | None,
        *,
        keep_reference: bool,
        eval_batch_size: int,
    ) -> None:
        self.args: TrainerConfig = args
        self.eval_prompts = eval_dataset if eval_dataset is not None else load_optional(args.eval_prompts)
        if self.eval_prompts:
            known = {id(reward) for reward in vars(self).get("rewards", {}).values()}  # tried already
            try_rewards(
                {name: r for name, r in rewards.items() if id(r) not in known}, self.eval_prompts, args.resolution
            )
        connect()
        # Accelerate would shard the denoiser too late, and on CPUs not at all: let it handle processes only.
        with patch_environment(ACCELERATE_USE_FSDP="false"):
            self.accelerator = Accelerator(
                mixed_precision=args.mixed_precision,
                log_with=tracker_names(args.report_to) or None,
                project_dir=args.output_dir,
                # Buffers are constants, and processes may call the denoiser a different number of times per pass.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        check_world(self.accelerator.num_processes)
        self.shards = wants_shards(self.accelerator.device)
        if self.shards is not None:
            args.validate_shards()
        self.check_batches(self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            refuse_busy(args.output_dir)
            check_products(args.output_dir)
        self.model = model if isinstance(model, DiffusionModel) else self._load()
        if (known := loaded_commit(self.model)) is not None:
            # A branch may move: config.yaml records the commit.
            self.args = args = dataclasses.replace(args, revision=known)
        if args.guidance_scale is None:
            # Record the family's scale for no guidance, so that config.yaml holds a number.
            self.args = args = dataclasses.replace(args, guidance_scale=self.model.unguided_scale)
        # A denoiser that will be sharded need not fit on one device.
        self.model.to_device(self.accelerator.device, args.offload, denoiser=self.shards is None)
        # Gradient checkpointing recomputes blocks outside the attention context, so do not set one.
        slow = self.accelerator.device.type == "cpu" and args.mixed_precision == "bf16"
        self.model.plain_attention = slow and not args.gradient_checkpointing
        if args.gradient_checkpointing:
            self.model.raw_denoiser.enable_gradient_checkpointing()
        self.noise = KeyedRNG(args.seed)
        self.encoded = PromptEmbeddingCache(self.model, folder=args.cache_folder)
        self.loop = self.prepare(keep_reference)
        if self.loop.ema is not None:
            self.model.weights.add(EMA_SET, self.loop.ema.shadow)
        self.report = Report(self.model, args, self.name, EMA_SET if self.loop.ema else POLICY)
        self.evaluation = Evaluation(
            self.model,
            self.eval_prompts,
            rewards,
            self.encoded,
            self.accelerator,
            images_per_prompt=args.eval_images_per_prompt,
            batch_size=eval_batch_size,
            pulse=self.loop.pulse,
            even=self.shards is not None,
        )

    def prepare(self, keep_reference: bool) -> Loop:
        """Make the denoiser trainable and build the loop that trains it."""
        self.model.train(
            self.args.lora,
            seed=self.args.seed,
            keep_reference=keep_reference,
            shards=self.shards,
        )
        set_performance(self.model, self.args.attention, self.args.mixed_precision, self.args.compile)
        loop = Loop(self, self.model.raw_denoiser, self.args, self.accelerator)
        self.model.denoiser = loop.module
        return loop

    def _load(self) -> DiffusionModel:
        args = self.args
        return load_model(
            args.model,
            revision=args.revision,
            dtype=args.base_dtype,
            quantise=args.quantise,
            max_sequence_length=args.max_sequence_length,
            resolution=args.resolution,
            embedded_guidance=args.embedded_guidance,
        )

    def check_batches(self, processes: int) -> None:
        """Raise ValueError where batches do not divide over the processes. Called before the model is loaded."""

    @property
    def guidance(self) -> Guidance:
        """Guidance of every sampling."""
        return self.encoded.guidance(self.guidance_scale)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of every sampling, as the model's pipeline defines it."""
        scale = self.args.guidance_scale
        return self.model.unguided_scale if scale is None else scale

    @property
    def eval_base_steps(self) -> int:
        """First steps of an evaluation's sampling that the reference model takes."""
        return 0

    @property
    @abstractmethod
    def eval_levels(self) -> Level:
        """Levels of an evaluation's sampling."""

    def train(self) -> None:
        """Train to ``max_train_steps``; write the LoRA, the model card, curves and a base-versus-tuned grid."""
        self.model.about = self.about()
        self.loop.say(opening(self))
        self.loop.run()
        if self.report.paths:
            self.loop.say(closing(self.report))

    @property
    def resume_command(self) -> str:
        """Shell command that resumes this run."""
        several = self.accelerator.num_processes > 1
        program = f"accelerate launch scripts/train_{self.name}.py" if several else f"diffalign train {self.name}"
        config = shlex.quote(str(portable(self.args).output_dir / "config.yaml"))
        return f"{program} --config {config}{consent_option(self.args)} --resume_from_checkpoint latest"

    @property
    def commits(self) -> dict[str, str]:
        """Commit of each hub repository that model, data and rewards were loaded from."""
        args: Any = self.args
        sources = (name for field in ("train_data", "train_images") for name in getattr(args, field, ()))
        named = [(name, args.data.revision, "dataset") for name in sources]
        named += [(args.model, args.revision, "model"), *((*found, "model") for found in repositories())]
        known = {name: commit(name, revision, kind) for name, revision, kind in named}
        return {name: found for name, found in known.items() if found is not None}

    @cached_property
    def contents(self) -> dict[str, dict[str, str]]:
        """Fingerprints of the local files and data that this run depends on, taken at its start."""
        rewards = {**self.evaluation.rewards, **getattr(self, "rewards", {})}
        return {**contents(self.args, rewards), **self.data_contents}

    def about(self) -> dict[str, str]:
        """Metadata for the header of the LoRA file: how it was trained."""
        args, made = self.args, self.loop.origin()
        said = {
            "version": version("diffalign"),
            "trainer": self.name,
            "base_model": args.model,
            "base_revision": args.revision or "",
            "rank": str(args.lora.rank),
            "alpha": str(args.lora.rank),  # of the file, whose B has alpha / rank in it
            "trained_alpha": str(args.lora.alpha or args.lora.rank),
            "seed": str(args.seed),
            "config_sha256": made["config_sha256"],
            "data_sha256": made["data_sha256"],
        }
        # A header is UTF-8; a path on disk may not be.
        return {f"diffalign.{name}": value.encode("utf-8", "replace").decode() for name, value in said.items()}

    def ids(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """Identify the samples of an optimizer step, for skipped.jsonl."""
        return []

    def collected(self) -> dict[str, Tensor]:
        """Rollout data to checkpoint; empty if ``collect`` is reproducible from the current weights."""
        return {}

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore the iteration's data from what ``collected`` returned."""

    def updating(self) -> AbstractContextManager[None]:
        """Return a context for the passes of an optimizer step."""
        return self.model.keeping(*self.grad_through)

    @abstractmethod
    def probe(self) -> list[Tensor]:
        """Return outputs of the denoiser on the iteration's data that the first update must change."""

    @property
    def has_gradient(self) -> bool:
        """Whether the last optimizer step had a gradient, so that it must have changed the outputs."""
        return True

    def check_on_policy(self) -> None:
        """Raise CannotTrain where the unchanged weights do not reproduce what the iteration stored."""

    @torch.no_grad()
    def before_first_update(self) -> None:
        """Check that the run is on policy, and keep the denoiser's outputs from before the first update."""
        self.first_outputs = self.probe()
        self.check_on_policy()

    @torch.no_grad()
    def after_first_update(self) -> None:
        """Raise CannotTrain where an update with a gradient left the denoiser's outputs as they were: the canary."""
        same = all(torch.equal(now, before) for now, before in zip(self.probe(), self.first_outputs, strict=True))
        if same and self.has_gradient:
            raise CannotTrain(
                "the first update changed nothing in the denoiser's output: the trained weights are not part of it "
                "(check lora.targets), or learning_rate is too small for this precision" + extremes(self.args)
            )

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Act on optimizer step ``step`` (from 1); may add to ``metrics``, means over all processes."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trainer's own state for a checkpoint: tensors and JSON values."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""

    def evaluate(self, step: int) -> Metrics:
        """Sample the held-out prompts with the ODE at fixed seeds, and score them; EMA weights if there are any."""
        if not self.eval_prompts:
            return {}
        # auto_batch may have halved it.
        self.evaluation.batch_size = getattr(self.args, batch_name(self.args, "evaluate"))
        with self.model.using(self.report.weight_set):
            figures, shown = self.evaluation.run(self.eval_levels, self.guidance, self.eval_base_steps)
        if self.accelerator.is_main_process:
            keep_prompts(self.args.output_dir / HELD_OUT, self.eval_prompts)
            self.report.picture(step, shown)
        return figures

    def exporter(self) -> Callable[[Path], object] | None:
        """Return a function that writes the LoRA (of the EMA if there is one); None for full weights."""
        if not (self.model.has_adapter or self.model.negative is not None):
            return None
        return self.model.saver(self.report.weight_set, self.accelerator.is_main_process)

    def finish(self) -> list[Path]:
        """Export the weights and write the card, the curves and the comparison; return what was written."""
        main = self.accelerator.is_main_process
        savers = {folder: self.model.saver(name, main) for folder, name in self.report.exports.items()}
        return self.report.finish(savers) if main else []
