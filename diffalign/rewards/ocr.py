"""OCR reward of Flow-GRPO (arXiv 2505.05470): similarity of the text in an image to the text in the prompt.

Uses RapidOCR (``pip install diffalign[ocr]``), which includes its weights. Departures from the published code: 1. it
uses PaddleOCR's English models; 2. it reads the target between straight quotes only, this between curly ones too; 3. it
does not pad narrow images; 4. it scores 0 if OCR fails, this raises the error.
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

# RapidOCR scales the shorter side to hundreds of pixels, so a narrow strip would become huge.
MAX_ASPECT = 8  # longer side / shorter side
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def _load() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("the reward 'ocr' reads with RapidOCR: pip install diffalign[ocr]") from error
    return RapidOCR(params={"Global.log_level": "error"})


def padded(image: Tensor) -> Tensor:
    """Pad an image (3, H, W) with white, below or on the right, to an aspect ratio of at most ``MAX_ASPECT``."""
    height, width = image.shape[-2:]
    right, below = max(0, -(-height // MAX_ASPECT) - width), max(0, -(-width // MAX_ASPECT) - height)
    return F.pad(image, (0, right, 0, below), value=1.0)


def read(engine: Any, image: Tensor) -> str:
    """Read the text of an image (3, H, W), float, [0, 1]: lines from top to bottom, joined without spaces."""
    pixels = to_bytes(padded(image)).flip(0).permute(1, 2, 0).cpu().numpy()  # BGR
    return "".join(engine(pixels).txts or ())


def distance(a: str, b: str) -> int:
    """Compute the Levenshtein distance."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(a, b)


def similarity(found: str, target: str) -> float:
    """1 if ``found`` contains ``target``, else max(0, 1 - distance / length); ignores spaces and case."""
    found, target = ("".join(text.split()).lower() for text in (found, target))
    return 1.0 if target in found else max(0.0, 1 - distance(found, target) / len(target))


def target_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """Return metadata "text", or else the first quotation in the prompt. Raises ValueError without either."""
    quoted = QUOTED.search(prompt)
    target = metadata.get("text") or (quoted and (quoted.group(1) or quoted.group(2))) or ""
    target = target if isinstance(target, str) else str(target)  # tables may convert digits to a number
    if not target.strip():
        raise ValueError(f'no text to look for in {shorten(prompt, 80)!r}: quote it ("..."), or give metadata "text"')
    return target


@dataclass(frozen=True)
class OcrReward:
    """Score how closely the text in an image matches the target text, in [0, 1]."""

    name: str
    differentiable: bool = False
    range: tuple[float, float] = (0.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU. ValueError: no target text."""
        targets = [target_of(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        engine = load_once(_load)
        return torch.tensor([similarity(read(engine, i), t) for i, t in zip(images, targets, strict=True)])


OCR = RewardCard("whether the image shows the text that the prompt quotes", 0.1, "arXiv 2505.05470", extra="ocr")


@register("ocr", OCR)
def ocr(name: str) -> OcrReward:
    """Build the reward on RapidOCR's default models, for English and Chinese."""
    return OcrReward(name)
