"""What every trainer can be told about its model, its adapter and its evaluations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.config import option, split_texts
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import LoraConfig
from diffalign.runtime.config import TrainingConfig

if TYPE_CHECKING:
    import torch

# Setting -> its values that work where weights are in shards.
KNOWN_WITH_SHARDS: dict[str, tuple[Any, ...]] = {
    "compile": (False,),
    "quantise": ("no",),
    "mixed_precision": ("bf16", "no"),
    "optimizer": ("adamw",),
}


@dataclasses.dataclass(kw_only=True)
class TrainerConfig(TrainingConfig):
    """What every trainer can be told about its model, its adapter and its evaluations."""

    model: str = option("", "folder in diffusers' layout, or a hub id")
    revision: str | None = option(None, "branch, tag or commit of a hub model; config.yaml keeps the commit it was")
    max_sequence_length: int | None = option(
        None, "text tokens per prompt; default: the pipeline's own", ge=1, le=100_000
    )
    resolution: int | None = option(
        None, "side of the square images, in pixels; default: the pipeline's own", ge=1, le=100_000
    )
    lora: LoraConfig = option(LoraConfig(), "the adapter")
    schedule: str = option("pipeline", "pipeline: the scheduler's own sigmas; uniform: sigmas = linspace(1, 1/N, N)")
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance wherever the model samples, as its pipeline means it (FLUX, Qwen-Image: "
        "true_cfg_scale); 1 or less guides nothing (Z-Image: 0); default: no guidance",
    )
    embedded_guidance: float | None = option(
        None, "guidance that a distilled model (FLUX.1-dev) is told, 0 or more; default: the pipeline's own"
    )
    attention: str = option("native", "auto, native, flash, xformers, or another back end of diffusers' dispatcher")
    compile: bool = option(False, "torch.compile the denoiser's blocks: minutes at the start, faster afterwards")
    base_precision: Literal["no", "bf16"] = option(
        "no", "of the frozen base and the text encoders, for a LoRA, which stays float32; bf16 halves their memory"
    )
    quantise: Literal["no", "8bit", "4bit"] = option("no", "the frozen base, by bitsandbytes; for a LoRA on a GPU")
    gradient_checkpointing: bool = option(False, "less memory, one more forward pass")
    offload: tuple[Literal["text_encoders", "vae"], ...] = option(
        (), "parts that are on the device only while a phase uses them: less memory there, for copies from the CPU's"
    )
    cache: bool = option(False, "keep prompt embeddings on disk")
    cache_dir: Path | None = option(None, "where, so that runs share them; default: cache/ in output_dir")
    allow_reward_code: bool = option(
        False, "trust files with rewards that are code or servers; counts only where it is typed", typed_only=True
    )
    eval_prompts: Path | None = option(None, ".txt or .jsonl of held-out prompts; none: no evaluation")
    eval_rewards: tuple[str, ...] = option(
        (), "names of rewards; the first one is reported as accuracy", guard=guard_rewards
    )
    eval_images_per_prompt: int = option(
        2, "images per held-out prompt; two at least measure diversity", ge=1, le=100_000
    )

    def __post_init__(self) -> None:
        """Accept paths as text, and a text where several go."""
        super().__post_init__()
        split_texts(self)
        self.eval_prompts = self.eval_prompts and Path(self.eval_prompts)
        self.cache_dir = self.cache_dir and Path(self.cache_dir)

    @property
    def base_dtype(self) -> torch.dtype:
        """What the base loads in."""
        import torch

        return torch.bfloat16 if self.base_precision == "bf16" else torch.float32

    @property
    def cache_folder(self) -> Path | None:
        """Where prompt embeddings, and what else a trainer encodes, are kept."""
        return (self.cache_dir or self.output_dir / "cache") if self.cache else None

    def validate(self) -> None:
        """ValueError, with what to write instead, for what cannot train; reads no file."""
        super().validate()
        from diffalign.models.base import SCHEDULES
        from diffalign.structures import check_guidance

        if not self.model:
            raise ValueError("model is missing: write model: assets/shapes-sd3, or a hub id")
        if self.quantise != "no" and self.lora.rank == 0:
            raise ValueError(f"quantise {self.quantise} freezes the base: give lora.rank, or set quantise: no")
        if self.base_precision != "no" and self.lora.rank == 0:
            raise ValueError(f"base_precision {self.base_precision} freezes the base: give lora.rank, or leave it out")
        if self.cache_dir and not self.cache:
            raise ValueError(f"cache_dir {self.cache_dir}, and nothing is kept: set cache: true, or leave it out")
        for name in ("resolution", "max_sequence_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}: leave it out for the pipeline's own")
        for name in ("guidance_scale", "embedded_guidance"):
            check_guidance(name, getattr(self, name))
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def validate_shards(self) -> None:
        """ValueError, with what to write instead, for what is not known to work on weights in shards (FSDP2)."""
        for name, known in KNOWN_WITH_SHARDS.items():
            if (given := getattr(self, name)) not in known:
                value = str(known[0]).lower()
                raise ValueError(f"{name} {given} does not go with FSDP2: set {name}: {value}, or launch with ddp.yaml")
