"""DeQA-Score (arXiv 2501.11561): mPLUG-Owl2 rates the quality of an image in five levels; ignores prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.levels import expected_level
from diffalign.rewards.support.mplug_owl2 import MplugOwl2, OwlConfig
from diffalign.rewards.support.preprocess import Preprocess, on_images, should_quantize, stretch
from diffalign.rewards.support.weights import Weights, check_report, frozen, load_once, on_device
from diffalign.rewards.vqascore import PAD

# zhiyuanyou/DeQA-Score @ 8e4abc8, src/evaluate/scorer.py
BEFORE = "USER: How would you rate the quality of this image?\n"
AFTER = "\nASSISTANT: The quality of the image is"
LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}


def _load(weights: Weights) -> tuple[MplugOwl2, Any]:
    source = {"revision": weights.revision}
    config = OwlConfig.from_pretrained(weights.path, **source)
    model, report = MplugOwl2.from_pretrained(
        weights.path,
        config=config,
        dtype=weights.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report names them
        **source,
    )
    check_report(report, weights.path, "mPLUG-Owl2")
    tokenizer = AutoTokenizer.from_pretrained(weights.path, trust_remote_code=False, **source)
    return frozen(model, weights), tokenizer


def without_start(tokenizer: Any, text: str) -> list[int]:
    """Tokenize without the start token that Llama's tokenizer puts in front."""
    ids = tokenizer(text).input_ids
    return ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids


@dataclass(frozen=True)
class DeQAReward:
    """Expected quality under the likelihood of the next token, among five levels: [1, 5].

    Args:
        name: under which scores are stored.
        weights: of the network.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (1.0, 5.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        model, tokenizer = load_once(_load, self.weights)
        quantize = should_quantize(self.quantize, images)
        step = Preprocess(goal=model.model["vision_model"].image_size, fit=stretch, pad=PAD)
        before = torch.tensor(tokenizer(BEFORE).input_ids, device=images.device)
        after = torch.tensor(without_start(tokenizer, AFTER), device=images.device)
        with on_device(model, self.weights, images.device):
            logits = model(step(images, quantize=quantize).to(model.dtype), before, after)
        return expected_level(logits, [without_start(tokenizer, level)[0] for level in LEVELS], list(LEVELS.values()))


FACTS = RewardCard("looks", 0.1, "arXiv 2501.11561", "zhiyuanyou/DeQA-Score-Mix3", "MIT", 8198)


@register("deqa", FACTS)
def deqa(
    name: str,
    path: str = FACTS.weights,
    revision: str | None = None,
    precision: str = "fp16",
    offload: bool = False,
    quantize: bool | None = None,
) -> DeQAReward:
    """Build the published model, or one of the same layout at ``path``."""
    return DeQAReward(name, Weights(path, revision, precision, offload), quantize)
