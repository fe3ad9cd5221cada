"""Whether an image holds the text that was asked for, as Flow-GRPO (arXiv 2505.05470) rewards it.

Read by RapidOCR (``pip install diffalign[ocr]``), which brings its weights along. Departures from the published code:
1. it reads with PaddleOCR's English models; 2. it takes what stands between the first straight quotes; 3. it crops no
strip and pads none; 4. where reading fails it gives 0, here the error is raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.files import shorten
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import on_images, to_bytes
from diffalign.rewards.support.weights import load_once

# RapidOCR enlarges the shorter side to hundreds of pixels, whatever becomes of the longer one.
LONGEST = 8  # times the shorter side
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def _load() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("the reward 'ocr' reads with RapidOCR: pip install diffalign[ocr]") from error
    return RapidOCR(params={"Global.log_level": "error"})


def padded(image: Tensor) -> Tensor:
    """An image (3, H, W) with white beneath or right of it where a side is more than ``LONGEST`` times the other."""
    height, width = image.shape[-2:]
    right, below = max(0, -(-height // LONGEST) - width), max(0, -(-width // LONGEST) - height)
    return F.pad(image, (0, right, 0, below), value=1.0)


def read(engine: Any, image: Tensor) -> str:
    """The text of an image (3, H, W), float, [0, 1], lines from top to bottom, without spaces between them."""
    pixels = to_bytes(padded(image)).flip(0).permute(1, 2, 0).cpu().numpy()  # BGR
    return "".join(engine(pixels).txts or ())


def distance(a: str, b: str) -> int:
    """Edit distance: how many letters to add, drop or change."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(a, b)


def similarity(found: str, target: str) -> float:
    """1 where ``found`` holds ``target``, else 1 - distance / length, at least 0; spaces and case do not count."""
    found, target = ("".join(text.split()).lower() for text in (found, target))
    return 1.0 if target in found else max(0.0, 1 - distance(found, target) / len(target))


def target_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text to show: metadata "text", else what the prompt quotes first. ValueError: neither."""
    quoted = QUOTED.search(prompt)
    target = metadata.get("text") or (quoted and (quoted.group(1) or quoted.group(2))) or ""
    target = target if isinstance(target, str) else str(target)  # a number, where a table has a column of them
    if not target.strip():
        raise ValueError(f'no text to look for in {shorten(prompt, 80)!r}: quote it ("..."), or give metadata "text"')
    return target


@dataclass(frozen=True)
class OcrReward:
    """How much of the text asked for an image shows, in [0, 1]."""

    name: str
    differentiable: bool = False
    range: tuple[float, float] = (0.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU. ValueError: a prompt without a text."""
        targets = [target_of(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        engine = load_once(_load)
        return torch.tensor([similarity(read(engine, i), t) for i, t in zip(images, targets, strict=True)])


@register("ocr", RewardCard("whether the image shows the text that the prompt quotes", 0.1, "arXiv 2505.05470"))
def ocr(name: str) -> OcrReward:
    """RapidOCR's default models, for English and Chinese."""
    return OcrReward(name)
