"""What all trainers share: the model made trainable, the loop around it, evaluations, exports, the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from accelerate import Accelerator
from torch import Tensor

from diffalign.config import save_yaml
from diffalign.models import DiffusionModel, load_model
from diffalign.models.weights import POLICY
from diffalign.rewards.base import Reward
from diffalign.rollout.encoding import EncodedPrompts
from diffalign.runtime.loop import Loop, Metrics
from diffalign.runtime.noise import Noise
from diffalign.runtime.processes import check_world, connect
from diffalign.runtime.tracking import tracker_names
from diffalign.structures import Guidance, Level, Prompt
from diffalign.trainers.evaluation import Evaluation
from diffalign.trainers.inputs import load_optional
from diffalign.trainers.report import Report
from diffalign.trainers.settings import TrainerConfig
from diffalign.trainers.speed import set_speed

EMA_SET = "ema"
Config = TypeVar("Config", bound=TrainerConfig)


def named_model(args: Config, model: str | Path | DiffusionModel | None) -> Config:
    """``args`` with the name of the model that was passed beside them."""
    if isinstance(model, DiffusionModel):
        return args if args.model else dataclasses.replace(args, model=_origin(model))
    return args if model is None else dataclasses.replace(args, model=str(model))


def _origin(model: DiffusionModel) -> str:
    return model.pipeline.config.get("_name_or_path") or "model"


class Trainer:
    """A task for the loop, less what it collects and which losses it yields.

    args: valid already. rewards: those that evaluations report, the first as accuracy. keep_reference: whether the
    base's weights will be needed. eval_batch_size: images per forward pass of an evaluation.
    """

    name: ClassVar[str]

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
        connect()
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=tracker_names(args.report_to) or None,
            project_dir=args.output_dir,
        )
        check_world(self.accelerator.num_processes)
        self.check_batches(self.accelerator.num_processes)
        self.model = model if isinstance(model, DiffusionModel) else self._load()
        self.model.pipeline.to(self.accelerator.device)
        self.model.plain_attention = self.accelerator.device.type == "cpu" and args.mixed_precision == "bf16"
        self.model.train(args.lora, seed=args.seed, keep_reference=keep_reference)
        set_speed(self.model, args)
        if args.gradient_checkpointing:
            self.model.raw_denoiser.enable_gradient_checkpointing()
        self.noise = Noise(args.seed)
        self.encoded = EncodedPrompts(self.model)
        self.loop = Loop(self, self.model.raw_denoiser, args, self.accelerator)
        self.model.denoiser = self.loop.module
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
        )

    def _load(self) -> DiffusionModel:
        args = self.args
        return load_model(
            args.model,
            quantise=args.quantise,
            max_sequence_length=args.max_sequence_length,
            resolution=args.resolution,
        )

    def check_batches(self, processes: int) -> None:
        """ValueError where the batches do not divide over the processes; called before a model is loaded."""

    @property
    def guidance(self) -> Guidance:
        """That of every sampling."""
        scale = self.args.guidance_scale
        return Guidance(scale, self.encoded.empty if scale != 1 else None)

    @property
    def eval_levels(self) -> Level:
        """Those that an evaluation samples at."""
        raise NotImplementedError

    def train(self) -> None:
        """Runs to ``max_train_steps``, and writes the LoRA, the model card, curves and a base-versus-tuned grid."""
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            save_yaml(self.args, self.args.output_dir / "config.yaml")
        self.loop.run()

    def before_first_update(self) -> None:
        """Checks that must hold when the weights have not moved yet."""

    def after_first_update(self) -> None:
        """Checks that must hold once they have."""

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Follows optimizer step number ``step`` (from 1), with its figures over all processes."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold of this trainer: tensors, and what JSON can hold."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""

    def evaluate(self, step: int) -> Metrics:
        """ODE sampling of the held-out prompts at fixed seeds, with the averaged weights where there are any."""
        if not self.eval_prompts:
            return {}
        with self.model.using(self.report.weight_set):
            figures, shown = self.evaluation.run(self.eval_levels, self.guidance)
        if self.accelerator.is_main_process:
            self.report.picture(step, shown)
        return figures

    def export(self, folder: Path) -> None:
        """A LoRA as it is now, averaged where weights are averaged; full weights are in the checkpoint already."""
        if self.model.has_adapter:
            with self.model.using(self.report.weight_set):
                self.model.save(folder)

    def finish(self) -> None:
        """Exports the weights and writes the card, the curves and the comparison."""
        if self.accelerator.is_main_process:
            self.report.finish()
