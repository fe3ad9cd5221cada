"""Prepare inputs of Qwen's vision-language models: image patches, and prompts in their chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from diffalign.rewards.support.preprocess import at_least_float32, check_images, resize
from diffalign.rewards.support.prompts import escape_special_tokens
from diffalign.rewards.support.weights import Weights, check_report, frozen, on_device

MIN_TOKENS, MAX_TOKENS = 4, 16384  # per image
IMAGE = "<|image_pad|>"  # one per merged patch


@dataclass(frozen=True)
class Patches:
    """Convert images to patches by the settings of ``preprocessor_config.json``.

    Args:
        smallest: minimum area in pixels; smaller images are enlarged.
        largest: maximum area in pixels; larger images are reduced.
        patch: side of a patch in pixels.
        merge: patches per direction that form one token of the language model.
        frames: repetitions of a still image in time.
        mean: per channel.
        std: per channel.
    """

    smallest: int
    largest: int
    patch: int
    merge: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, path: str, revision: str | None = None) -> Patches:
        """Read the settings of a published model."""
        own = AutoImageProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
        size = own.size
        return cls(
            size["shortest_edge"],
            size["longest_edge"],
            own.patch_size,
            own.merge_size,
            own.temporal_patch_size,
            tuple(own.image_mean),
            tuple(own.image_std),
        )

    def __call__(self, images: Tensor, *, quantize: bool) -> tuple[Tensor, Tensor]:
        """Convert images (B, 3, H, W), float, [0, 1], to patches, image by image, and their grids (B, 3).

        Raises ValueError for a wrong shape or dtype, or an aspect ratio above 200.
        """
        check_images(images)
        height, width = images.shape[-2:]
        size = smart_resize(height, width, self.patch * self.merge, self.smallest, self.largest)
        pixels = resize(at_least_float32(images), size, quantize=quantize)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return patchify((pixels - mean) / std, self.patch, self.merge, self.frames)


def patchify(pixels: Tensor, patch: int, merge: int, frames: int) -> tuple[Tensor, Tensor]:
    """Reshape pixels (B, 3, H, W) to patches (B h w, 3 frames patch^2), and return grids (B, 3) of (1, h, w).

    Patches that will be merged are adjacent.
    """
    count, channels, height, width = pixels.shape
    h, w = height // patch, width // patch
    blocks = pixels.view(count, channels, h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    grid = torch.tensor([1, h, w], device=pixels.device).expand(count, 3)
    return rows.reshape(count * h * w, channels * frames * patch * patch), grid


Loaded = tuple[Any, Any, Patches]  # model, tokenizer and patch settings


def load(weights: Weights) -> Loaded:
    """Load a published model (2-VL, 2.5-VL, 3-VL), its tokenizer and its patch settings.

    Images are resized to 4 to 16384 tokens as ``qwen_vl_utils`` does, which VQAScore was published with, and not by the
    limits of the model's own processor.
    """
    model, tokenizer, patches = load_with_own_limits(weights)
    area = (patches.patch * patches.merge) ** 2
    return model, tokenizer, replace(patches, smallest=MIN_TOKENS * area, largest=MAX_TOKENS * area)


def load_with_own_limits(weights: Weights) -> Loaded:
    """Load as ``load`` does; images are resized by the limits of the model's own processor."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        weights.path,
        revision=weights.revision,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report names them
    )
    check_report(report, weights.path, type(model).__name__)
    tokenizer = AutoTokenizer.from_pretrained(weights.path, revision=weights.revision, trust_remote_code=False)
    return frozen(model, weights), tokenizer, Patches.of(weights.path, weights.revision)


def answer_logits(
    loaded: Loaded,
    weights: Weights,
    images: Tensor,
    texts: Sequence[str],
    *,
    quantize: bool,
    rows: Sequence[int] | None = None,
    answers: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Compute logits at the start of the answers to questions about images.

    Args:
        loaded: of ``load``.
        weights: placement of the model.
        images: (B, 3, H, W), float, [0, 1].
        texts: N questions.
        quantize: round pixels to 8 bits.
        rows: image of each question; None for one question per image.
        answers: N lists of token ids that follow the questions; None for none.

    Returns:
        (N, K + 1, vocabulary), K the length of the longest answer: the logits before and at each of its tokens, aligned
        on the right.
    """
    model, tokenizer, patches = loaded
    pixels, grid = patches(images, quantize=quantize)
    count = len(pixels) // len(images) // patches.merge**2
    if rows is not None:
        pixels = pixels.view(len(images), -1, pixels.shape[-1])[list(rows)].flatten(0, 1)
        grid = grid[list(rows)]
    escaped = [escape_special_tokens(tokenizer, text) for text in texts]
    ids, mask = chat(tokenizer, escaped, count, "left", images.device, answers)
    with on_device(model, weights, images.device):
        return model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels.to(model.dtype),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            logits_to_keep=1 + max(map(len, answers or [()])),
            use_cache=False,
        ).logits


def chat(
    tokenizer: Any,
    texts: Sequence[str],
    tokens_per_image: int,
    side: str,
    device: torch.device,
    answers: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokenize one user turn of an image and a text per row: ids and mask (B, L), padded on ``side``.

    answers: token ids that follow each turn.
    """
    chats = []
    for text in texts:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat_text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, _, after = chat_text.partition(IMAGE)
        chats.append(before + IMAGE * tokens_per_image + after)
    if answers is None:
        encoded = tokenizer(chats, padding=True, padding_side=side, return_tensors="pt").to(device)
        return encoded.input_ids, encoded.attention_mask
    ids = [[*turn, *answer] for turn, answer in zip(tokenizer(chats).input_ids, answers, strict=True)]
    encoded = tokenizer.pad({"input_ids": ids}, padding=True, padding_side=side, return_tensors="pt").to(device)
    return encoded.input_ids, encoded.attention_mask
