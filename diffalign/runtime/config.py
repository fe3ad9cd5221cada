"""Configuration that the training loop reads."""

from __future__ import annotations

import re
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.config import Checked, Given, option
from diffalign.remote import address

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(kw_only=True)
class TrainingConfig(Checked):
    """Configuration of the training loop. A trainer's own adds what to collect and how to score it.

    Fields with ``resume="free"`` may differ when a run is resumed: they choose what is written or evaluated, or how
    work is split into batches, and leave the weights the same up to rounding.
    """

    products: ClassVar[tuple[str, ...]] = ()  # files that this kind of run writes into its folder, besides those of all

    given: InitVar[Given] = None
    output_dir: Path = option(Path("runs/default"), "run folder", section="run", resume="free")
    seed: int = option(0, "seed of every random draw of the run", section="run", infinite=False)
    max_train_steps: int = option(100, "number of optimizer steps", section="optimizer", ge=1)
    learning_rate: float = option(3e-4, "peak learning rate", section="optimizer", gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "constant", "learning rate schedule after the warm-up", section="optimizer"
    )
    lr_warmup_steps: int = option(0, "optimizer steps of linear warm-up", section="optimizer", ge=0)
    optimizer: Literal["adamw", "adamw_8bit"] = option(
        "adamw", "adamw_8bit stores smaller moments and needs bitsandbytes", section="optimizer"
    )
    adam_beta1: float = option(0.9, "decay rate of AdamW's first moment", section="optimizer", ge=0, lt=1)
    adam_beta2: float = option(0.999, "decay rate of AdamW's second moment", section="optimizer", ge=0, lt=1)
    adam_weight_decay: float = option(1e-4, "AdamW weight decay", section="optimizer", ge=0)
    adam_epsilon: float = option(1e-8, "AdamW epsilon", section="optimizer", ge=1e-30)
    max_grad_norm: float = option(
        1.0, "gradient norm to clip to; .inf disables clipping", section="optimizer", gt=0, infinite=True
    )
    ema_decay: float = option(
        0.0,
        "decay of averaged weights, which are evaluated and exported; 0 disables them",
        section="optimizer",
        ge=0,
        lt=1,
        hint="0 turns it off, 0.9 to 0.999 are usual",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "autocast precision of the denoiser", section="performance"
    )
    eval_steps: int = option(
        0,
        "optimizer steps between evaluations; 0: at the start and the end only",
        section="evaluation",
        resume="free",
        ge=0,
    )
    checkpointing_steps: int = option(
        0, "optimizer steps between checkpoints; 0: at the end only", section="checkpoints", resume="free", ge=0
    )
    checkpoints_total_limit: int = option(
        2,
        "number of checkpoints to keep",
        section="checkpoints",
        resume="free",
        ge=2,
        hint="with 1, a crash while saving leaves none",
    )
    resume_from_checkpoint: str | None = option(
        None,
        '"latest", the path of a checkpoint, or the fsspec address of one or of a run (s3://bucket/runs/x)',
        section="checkpoints",
        resume="free",
    )
    output_copy: str | None = option(
        None,
        "fsspec address (s3://bucket/runs/x, gs://...) or folder to which the run is copied after each checkpoint and "
        "at the end; `latest` also resumes from it",
        section="output",
        resume="free",
    )
    report_to: str = option(
        "none", "none, all, or some of tensorboard, wandb and trackio, with commas", section="run", resume="free"
    )
    push_to_hub: str | None = option(
        None, "upload the run to this repository of the hub, owner/name", section="output", resume="free"
    )
    hub_strategy: Literal["end", "checkpoints"] = option(
        "end",
        "end: upload once; checkpoints: also the LoRA of each checkpoint",
        section="output",
        resume="free",
        needs="push_to_hub",
    )
    hub_private: bool = option(
        True,
        "create the repository as a private one; an existing one stays as it is",
        section="output",
        resume="free",
        needs="push_to_hub",
    )
    max_grad_spike: float = option(
        100.0,
        "skip a step whose gradient norm exceeds this multiple of the usual norm; 0 or .inf: never",
        section="optimizer",
        ge=0,
        infinite=True,
    )
    hang_timeout: float = option(
        3600.0,
        "seconds without progress after which the run ends with all stack traces; 0 or .inf: never",
        section="run",
        resume="free",
        ge=0,
        infinite=True,
    )
    auto_batch: bool = option(
        False,
        "halve a batch size on out-of-memory and continue; single process only",
        section="performance",
        resume="free",
    )

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        self.check()  # fields may have been assigned since the construction
        if self.push_to_hub is not None and not HUB_ID.fullmatch(self.push_to_hub):
            raise ValueError(f"push_to_hub {self.push_to_hub[:100]!r} is no owner/name, such as me/my-lora")
        if self.output_copy is not None:
            self._check_copy(self.output_copy)
        if 0 < self.hang_timeout < 1:
            raise ValueError(f"hang_timeout must be at least 1 second, got {self.hang_timeout}; 0 turns it off")

    def _check_copy(self, target: str) -> None:
        """Refuse an address with credentials, and a folder that holds the run folder or lies in it."""
        found = address(target)
        here, there = self.output_dir.absolute(), Path(target).absolute()
        if not target.strip() or (found is None and (there.is_relative_to(here) or here.is_relative_to(there))):
            raise ValueError(f"output_copy {target[:100]!r} overlaps with output_dir {here}: name another place")
