"""Sections that configurations of several commands share: the adapter, and rewards by name.

This module imports nothing heavy, so that ``--help`` and configuration errors need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffalign.config import Checked, Given, option


@dataclass(frozen=True)
class LoraConfig(Checked):
    """Low-rank adapters on the denoiser (arXiv 2106.09685): W + alpha / rank * B A, with B starting at 0."""

    bare_field: ClassVar[str] = "rank"

    rank: int = option(
        32,
        "rank of the adapter; 0 trains all weights of the denoiser instead, and on the command line leaves out, with a "
        "warning, what a config file sets for a LoRA",
        ge=0,
        le=65_536,
    )
    alpha: float | None = option(
        None,
        "numerator of the adapter's scale alpha / rank; default: the rank",
        gt=0,
        hint="leave it out for alpha = rank",
    )
    targets: tuple[str, ...] | None = option(
        None, "names (or endings) of the adapted layers; default: the family's attention layers"
    )
    layers: str | None = option(
        None, "regular expression that the full names of the adapted layers match, as peft's; instead of targets"
    )
    blocks: tuple[int, ...] | None = option(
        None,
        "numbers of the adapted blocks, the first number in the names of their layers; default: all",
        ge=0,
    )
    rank_pattern: dict[str, int] = option(
        {}, "rank of single layers, by their ends or regular expressions of them", ge=1, le=65_536
    )
    alpha_pattern: dict[str, float] = option({}, "alpha of single layers; default: that of all", gt=0)
    use_dora: bool = option(False, "train the norms of the weights' rows too (DoRA, arXiv 2402.09353)")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)")
    text_encoder: bool = option(
        False,
        "train a LoRA of the same rank on the CLIP text encoders too, on their attention (SD 1.x, 2.x and SDXL)",
    )
    init: str | None = option(
        None,
        "LoRA to go on from, a path or hub id; its rank, alpha and layers are taken; with rank 0 it is merged into "
        "the base, all of which trains",
    )
    reference: Literal["init", "base"] = option(
        "init", "with init, what losses and KL terms compare with: the base with that LoRA, or the base alone"
    )

    def unread(self) -> Mapping[str, str]:
        """Fields that this configuration does not read: name -> reason."""
        shape = ("alpha", "targets", "layers", "blocks", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
        found = {}
        if self.layers is not None:
            found["targets"] = "is not read with lora.layers, which names layers too"
        if not self.rank:
            found |= dict.fromkeys((*shape, "text_encoder"), "is read only with a LoRA (lora.rank above 0)")
        if self.init is None:
            found["reference"] = "is read only with lora.init"
        elif self.rank:
            found |= dict.fromkeys(("rank", *shape), "is the LoRA's own with lora.init")
        else:
            found["reference"] = "is read only with a LoRA; with rank 0 the reference is the base with it merged"
        return found


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
    """One reward of a run: ``pickscore: 1.0``, or

    look: {reward: pickscore, weight: 0.5, options: {path: my/weights, precision: bf16}}

    mine: {path: runs/judge} is a judge of one's own, short for {reward: judge, options: {path: runs/judge}}
    """

    weight: float = option(1.0, "factor of the reward's score, or of its advantage", section="rewards", infinite=False)
    reward: str = option(
        "",
        "registered name, module:function or file.py:function; default: the name of the entry",
        section="rewards",
    )
    options: dict[str, Any] = option(
        {},
        "arguments of the reward, such as path, revision, precision, offload or quantize",
        section="rewards",
        infinite=True,
    )
    path: str | None = option(
        None,
        "short for reward: judge with options.path: the folder of a judge of one's own, which `diffalign train reward` "
        "wrote",
        section="rewards",
    )

    def __post_init__(self, given: Given = None) -> None:  # noqa: RUF033 (of an InitVar)
        """Check every field, and write ``path`` out. ValueError: two paths."""
        super().__post_init__(given)
        if self.path is None:
            return
        if "path" in self.options:
            raise ValueError(f"path {self.path[:200]!r} and options.path: give one of them")
        object.__setattr__(self, "options", {"path": self.path, **self.options})
        object.__setattr__(self, "reward", self.reward or JUDGE)
        object.__setattr__(self, "path", None)


JUDGE = "judge"  # the registered reward of what `diffalign train reward` writes
JUDGE_FILES = (  # of which some tokenizers write others
    "model.safetensors", "config.json", "preprocessor_config.json", "judge.json", "raters.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model",
    "tokenizer.model", "added_tokens.json",
)  # fmt: skip
PASSED = "passed from Python"  # recorded for a reward object, which no file can name
RewardTable = Mapping[str, float | RewardConfig]
