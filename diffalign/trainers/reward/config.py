"""Configuration of the training of a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from diffalign.config import from_dict, load_yaml, option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import JUDGE_FILES, LoraConfig, RewardConfig
from diffalign.config.unread import refuse_unread
from diffalign.data.config import PreferenceDataConfig
from diffalign.runtime.config import TrainingConfig

NO_LORA = "read only with train: lora"


@dataclasses.dataclass(kw_only=True)
class RewardTrainerConfig(TrainingConfig):
    """Configuration of the training of a reward on preference pairs. ``validate`` refuses what cannot train."""

    reward_fields: ClassVar[tuple[str, ...]] = ("judges",)
    products: ClassVar[tuple[str, ...]] = (*JUDGE_FILES, "report.json", "label_next.parquet")
    usage: ClassVar[str] = "diffalign train reward --config FILE.yaml [--field VALUE ...] [--dry_run]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign train reward --config configs/reward/shapes.yaml --train_data runs/label/preferences.parquet",
        "diffalign train reward --backbone openai/clip-vit-large-patch14 --train_data pairs.parquet --dry_run",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "backbone", "train_data", "output_dir", "train", "max_train_steps", "learning_rate", "num_pairs",
        "prototypes", "judges", "held_out_share",
    )  # fmt: skip

    backbone: str = option(
        "",
        "CLIP or SigLIP model that becomes the judge: a folder in transformers' layout, or a hub id",
        section="model",
    )
    revision: str | None = option(None, "branch, tag or commit of a hub backbone", section="model")
    tokenizer: str | None = option(
        None, "folder or hub id of the tokenizer; default: the backbone's own (PickScore has none)", section="model"
    )
    train: Literal["head", "lora", "full"] = option(
        "head",
        "head: the projections of frozen towers, whose outputs are computed once; lora: the head and a LoRA; full: all",
        section="model",
    )
    lora: LoraConfig = option(
        LoraConfig(rank=8),
        "low-rank adapter of both towers; targets: by default q_proj, k_proj, v_proj",
        section="adapter",
    )
    train_data: tuple[str, ...] = option(
        (), "preference pairs with labels: files, folders, rollout buffers or hub ids", section="data"
    )
    data: PreferenceDataConfig = option(
        PreferenceDataConfig(ties="soft"), "how train_data, eval_data and label_data are read", section="data"
    )
    eval_data: tuple[str, ...] = option(
        (), "held-out pairs; training leaves out their prompts; default: a share of train_data", section="data"
    )
    held_out_share: float = option(
        0.2, "share of the prompts whose pairs are held out; no prompt is in both parts", section="data", gt=0, lt=1
    )
    rater_column: str = option(
        "user_id", "column with the name of the rater, as diffalign label writes it", section="data"
    )
    prototypes: int = option(
        1,
        "prototypes of raters, of which each rater has a mixture of its own (PAL); 1: one judge for all raters",
        section="model",
        ge=1,
        le=256,
    )
    rater_model: Literal["pal_a", "pal_b"] = option(
        "pal_b",
        "how raters differ, PAL's models: pal_a: by an ideal point in a latent space, one for all prompts; pal_b: by a "
        "map of the prompt to its ideal image",
        section="model",
    )
    tie_model: Literal["soft", "rao_kupper", "davidson"] = option(
        "soft",
        "how ties count: as soft labels of Bradley-Terry, or by a model with a learned probability of ties",
        section="loss",
    )
    num_pairs: int = option(64, "pairs per optimizer step, over all processes", section="optimizer", ge=1, le=1_000_000)
    train_batch_size: int = option(
        64, "pairs per forward pass while training", section="optimizer", resume="free", ge=1
    )
    eval_batch_size: int = option(
        64, "pairs per forward pass of evaluations", section="evaluation", resume="free", ge=1
    )
    judges: dict[str, float | RewardConfig] = option(
        {},
        "rewards that the report compares the judge with on held-out pairs, by name",
        bare=1.0,
        section="evaluation",
        resume="free",
        guard=guard_rewards,
        infinite=False,
    )
    label_next: int = option(
        50, "number of pairs to write that are worth a label next; 0: none", section="evaluation", resume="free", ge=0
    )
    label_data: tuple[str, ...] = option(
        (),
        "pairs, labelled or not, to choose those to label next from; default: train_data",
        section="evaluation",
        resume="free",
    )
    allow_reward_code: bool = option(
        False,
        "trust code of rewards and servers that are named; only valid on the command line",
        section="rewards",
        resume="free",
        typed_only=True,
    )

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: dotted name -> reason."""
        found = {"data.mask": "is read by losses of denoising errors only"}
        found["data.source"] = "is read by models that edit, and a judge sees the results alone"
        if self.train != "lora":
            found |= {"lora": NO_LORA}
        else:
            found |= dict.fromkeys(
                ("lora.init", "lora.reference", "lora.text_encoder"), "is for LoRAs of diffusion models"
            )
        if self.eval_data:
            found["held_out_share"] = "is replaced by eval_data"
        if self.prototypes == 1:
            found["rater_model"] = "read only with prototypes above 1"
        if not self.label_next:
            found["label_data"] = "read only with label_next"
        if self.push_to_hub is not None:
            found["hub_strategy"] = "is for LoRAs: a judge is uploaded once, at the end"
        return found

    @classmethod
    def from_yaml(cls, path: str | Path, **fields: Any) -> Self:
        """Read a configuration file; ``fields`` win over it. Raises ConfigError, a ValueError, as ``from_dict``."""
        return dataclasses.replace(from_dict(cls, load_yaml(path), str(path)), **fields)

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        super().validate()
        refuse_unread(self)
        if not self.backbone:
            raise ValueError("backbone is missing: write backbone: openai/clip-vit-large-patch14, or a folder")
        if self.train == "lora" and self.lora.rank == 0:
            raise ValueError("lora.rank 0 adapts nothing: give it a rank, or set train: head or train: full")
        if self.output_dir.absolute() == Path(self.backbone).absolute():
            raise ValueError(f"output_dir {self.output_dir} is the folder of the backbone: choose another one")
