"""Configuration that all trainers share: model, adapter, evaluation, performance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.config import from_dict, load_yaml, option
from diffalign.config.held_out import held_out_table
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import LoraConfig, RewardConfig
from diffalign.config.unread import refuse_unread
from diffalign.runtime.config import TrainingConfig

if TYPE_CHECKING:
    import torch

# Field -> its values that work with sharded weights.
KNOWN_WITH_SHARDS: dict[str, tuple[Any, ...]] = {
    "compile": (False,),
    "quantise": ("no",),
    "mixed_precision": ("bf16", "no"),
    "optimizer": ("adamw",),
}


@dataclasses.dataclass(kw_only=True)
class TrainerConfig(TrainingConfig):
    """Configuration that all trainers share: model, adapter, evaluation, performance.

    ``usage``, ``examples`` and ``essential`` (the options that matter first) are for ``--help``.
    """

    usage: ClassVar[str] = ""
    examples: ClassVar[tuple[str, ...]] = ()
    essential: ClassVar[tuple[str, ...]] = ()

    model: str = option(
        "",
        "model folder in diffusers' layout, hub id, or single file, FILE.safetensors or FILE.safetensors?base=FOLDER",
        section="model",
    )
    revision: str | None = option(
        None, "branch, tag or commit of a hub model; config.yaml records the commit", section="model"
    )
    family: str | None = option(
        None, "your own model family, for a pipeline of another class: file.py:Class or module:Class", section="model"
    )
    max_sequence_length: int | None = option(
        None, "text tokens per prompt; default: the pipeline's own", section="model", ge=1, le=100_000
    )
    resolution: int | tuple[int, int] | None = option(
        None,
        "side length of square images, or height and width ([768, 1344]), in pixels; default: the pipeline's own",
        section="model",
        ge=1,
        le=100_000,
    )
    lora: LoraConfig = option(LoraConfig(), "low-rank adapter", section="adapter")
    schedule: Literal["pipeline", "uniform"] = option(
        "pipeline", "pipeline: the scheduler's own sigmas; uniform: sigmas = linspace(1, 1/N, N)", section="sampling"
    )
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance wherever the model samples, as its pipeline defines it (FLUX, Qwen-Image: "
        "true_cfg_scale); 1 or less disables it (Z-Image: 0); default: no guidance",
        section="sampling",
        ge=0,
        hint="1 turns guidance off (Z-Image: 0)",
    )
    embedded_guidance: float | None = option(
        None,
        "guidance embedding of a distilled model (FLUX.1-dev); default: the pipeline's own",
        section="sampling",
        ge=0,
    )
    attention: str = option(
        "native", "auto, native, flash, xformers, or another backend of diffusers' dispatcher", section="performance"
    )
    compile: bool = option(
        False, "torch.compile the denoiser's blocks: takes minutes, then runs faster", section="performance"
    )
    base_precision: Literal["no", "bf16"] = option(
        "no",
        "precision of the frozen base and the text encoders under a float32 LoRA; bf16 halves their memory",
        section="performance",
    )
    quantise: Literal["no", "8bit", "4bit"] = option(
        "no", "quantise the frozen base with bitsandbytes; LoRA on a GPU only", section="performance"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", section="performance", resume="free"
    )
    offload: tuple[Literal["text_encoders", "vae", "rewards"], ...] = option(
        (),
        "keep these parts on the CPU while a phase does not use them; rewards: the networks to train on",
        section="performance",
        resume="free",
    )
    memory: str | None = option(
        None,
        "memory of the GPU, as 24GB, or auto for what is free: chooses batch sizes and savings that are not set, "
        "by a rehearsal of about a minute",
        section="performance",
        resume="free",
    )
    cache: bool = option(False, "keep prompt embeddings on disk", section="performance", resume="free")
    cache_dir: Path | None = option(
        None,
        "cache folder, to share it between runs; default: cache/ in output_dir",
        section="performance",
        resume="free",
    )
    allow_reward_code: bool = option(
        False,
        "trust code (of rewards, losses, a model family) and servers that are named; only valid on the command line",
        section="rewards",
        resume="free",
        typed_only=True,
    )
    eval_prompts: Path | None = option(
        None,
        "held-out prompts: file, address (s3://...), hub id or named set (geneval?split=test); default: no evaluation",
        section="evaluation",
        resume="free",
    )
    eval_rewards: tuple[str, ...] = option(
        (),
        "reward names; the first one is reported as accuracy",
        section="evaluation",
        resume="free",
        guard=guard_rewards,
    )
    held_out: dict[str, float | RewardConfig] = option(
        {},
        "judges that evaluations report and nothing trains on, by name; panel: the usual five without those trained on",
        bare=1.0,
        section="evaluation",
        resume="free",
        guard=guard_rewards,
        infinite=False,
    )
    eval_images_per_prompt: int = option(
        2,
        "images per held-out prompt; at least two to measure diversity",
        section="evaluation",
        resume="free",
        ge=1,
        le=100_000,
    )
    eval_num_steps: int | None = option(
        None,
        "ODE steps of evaluations; default: as in training",
        section="evaluation",
        resume="free",
        ge=1,
        le=10_000,
    )

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base is loaded in."""
        import torch

        return torch.bfloat16 if self.base_precision == "bf16" else torch.float32

    @property
    def cache_folder(self) -> Path | None:
        """The folder of cached prompt embeddings and latents; None without a cache."""
        return (self.cache_dir or self.output_dir / "cache") if self.cache else None

    def held_out_judges(self) -> dict[str, float | RewardConfig]:
        """Return the judges of ``held_out``. Raises ValueError for one that the run trains on."""
        return held_out_table(self.held_out, getattr(self, "rewards", None) or {})

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: dotted name -> reason, as "is read only with ..."."""
        return {}

    @classmethod
    def from_yaml(cls, path: str | Path, **fields: Any) -> Self:
        """Read a configuration file; ``fields`` win over it. Raises ConfigError, a ValueError, as ``from_dict`` does.

        FlowGRPOConfig.from_yaml("configs/flow_grpo/shapes.yaml", max_train_steps=20, lora=LoraConfig(rank=8))
        """
        return dataclasses.replace(from_dict(cls, load_yaml(path), str(path)), **fields)

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        super().validate()
        refuse_unread(self)
        self.held_out_judges()

        if not self.model:
            raise ValueError("model is missing: write model: assets/shapes-sd3, or a hub id")
        if self.family:
            from diffalign.models.registry import load_family

            load_family(self.family, self.allow_reward_code)
        if self.lora.text_encoder and "text_encoders" in self.offload:
            raise ValueError("lora.text_encoder uses them at every step: leave text_encoders out of offload")
        if self.quantise != "no" and self.lora.rank == 0:
            raise ValueError(f"quantise {self.quantise} freezes the base: give lora.rank, or set quantise: no")
        if self.base_precision != "no" and self.lora.rank == 0:
            raise ValueError(f"base_precision {self.base_precision} freezes the base: give lora.rank, or leave it out")
        if getattr(self, "base_share", 0) and self.lora.init and self.lora.rank and self.lora.reference == "init":
            raise ValueError(
                "base_share takes the first steps from the base, and lora.reference: init compares with base and LoRA: "
                "set lora.reference: base"
            )
        trains_negative = getattr(getattr(self, "recipe", None), "negative", None)
        if self.hub_strategy == "checkpoints" and self.lora.rank == 0 and not trains_negative:
            raise ValueError(
                "hub_strategy checkpoints uploads LoRAs, and lora.rank 0 trains all weights, which are uploaded at the "
                "end: leave it out"
            )
        if self.cache_dir and not self.cache:
            raise ValueError(f"cache_dir {self.cache_dir}, and nothing is kept: set cache: true, or leave it out")

    def validate_shards(self) -> None:
        """Refuse settings that are not known to work with sharded weights (FSDP2). ValueError, with a fix."""
        for name, known in KNOWN_WITH_SHARDS.items():
            if (given := getattr(self, name)) not in known:
                value = str(known[0]).lower()
                raise ValueError(f"{name} {given} does not go with FSDP2: set {name}: {value}, or launch with ddp.yaml")
