"""Image embeddings from a transformers vision model, for diversity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import AutoImageProcessor, AutoModel

from diffalign.rewards.support.preprocess import to_bytes

BATCH_SIZE = 32


class _Output(Protocol):
    last_hidden_state: Tensor


class ImageEmbedder:
    """A frozen vision model. path: folder or hub id for ``AutoModel`` (CLIP, SigLIP, DINOv2, ViT, ...)."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(path, trust_remote_code=False).to(device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) in [0, 1]; returns (N, D) float32 on the CPU."""
        return torch.cat(list(self._batches(images)))

    @torch.no_grad()
    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        for batch in images.split(BATCH_SIZE):
            pixels = self.processor([to_pil_image(image) for image in to_bytes(batch).cpu()], return_tensors="pt")
            pixels = pixels["pixel_values"].to(self.model.device)
            # CLIP-like models: the joint space with text; others: the pooled last layer
            if hasattr(self.model, "get_image_features"):
                output = self.model.get_image_features(pixel_values=pixels)
            else:
                output = self.model(pixel_values=pixels)
            yield _vector(output).float().cpu()


def _vector(output: Tensor | _Output) -> Tensor:
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return pooled.flatten(1) if pooled is not None else output.last_hidden_state[:, 0]
