"""How Qwen's vision-language models are fed: images as rows of patches, prompts through their chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from diffalign.rewards.support.preprocess import at_least_float32, check_images, resize
from diffalign.rewards.support.weights import Weights, frozen

MIN_TOKENS, MAX_TOKENS = 4, 16384  # words that an image becomes
IMAGE = "<|image_pad|>"  # one for each patch that the language model sees


@dataclass(frozen=True)
class Patches:
    """How an image becomes patches: the fields of ``preprocessor_config.json``.

    smallest, largest: number of pixels that an image is enlarged or reduced to. patch: side in pixels. merge: so many
    patches in each direction become one for the language model. frames: a still image is repeated so often.
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
        """Those of a published model."""
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
        """Images (B, 3, H, W), float, [0, 1], to rows of patches, image by image, and the grids (B, 3) that they form.

        ValueError: a shape or dtype that is wrong, or sides that differ 200 times.
        """
        check_images(images)
        height, width = images.shape[-2:]
        size = smart_resize(height, width, self.patch * self.merge, self.smallest, self.largest)
        pixels = resize(at_least_float32(images), size, quantize=quantize)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return patchify((pixels - mean) / std, self.patch, self.merge, self.frames)


def patchify(pixels: Tensor, patch: int, merge: int, frames: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) to (B h w, 3 frames patch^2), and grids (B, 3) of (1, h, w).

    Patches that will be merged follow each other.
    """
    count, channels, height, width = pixels.shape
    h, w = height // patch, width // patch
    blocks = pixels.view(count, channels, h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    grid = torch.tensor([1, h, w], device=pixels.device).expand(count, 3)
    return rows.reshape(count * h * w, channels * frames * patch * patch), grid


def load(weights: Weights) -> tuple[nn.Module, Any, Patches]:
    """A published model of the family (2-VL, 2.5-VL, 3-VL), its tokenizer, and how it cuts images.

    Images are resized as ``qwen_vl_utils`` does, which VQAScore was published with, whatever the model's own processor
    would do: to 4 to 16384 words of the language model.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        weights.path, revision=weights.revision, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(weights.path, revision=weights.revision, trust_remote_code=False)
    patches = Patches.of(weights.path, weights.revision)
    word = (patches.patch * patches.merge) ** 2
    return frozen(model, weights), tokenizer, replace(patches, smallest=MIN_TOKENS * word, largest=MAX_TOKENS * word)


def chat(
    tokenizer: Any, texts: Sequence[str], tokens_per_image: int, side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens and their mask (B, L), padded on the left or right ``side``, of one turn of an image and a text each."""
    asked = []
    for text in texts:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, _, after = written.partition(IMAGE)
        asked.append(before + IMAGE * tokens_per_image + after)
    encoded = tokenizer(asked, padding=True, padding_side=side, return_tensors="pt").to(device)
    return encoded.input_ids, encoded.attention_mask
