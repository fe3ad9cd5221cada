"""Embeddings of images by any vision model of transformers, for diversity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import AutoImageProcessor, AutoModel

from diffalign.rewards.support.preprocess import to_bytes

BATCH = 32


class ImageEmbedder:
    """path: a folder or hub id that ``AutoModel`` and ``AutoImageProcessor`` load: CLIP, SigLIP, DINOv2, ViT ..."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(path, trust_remote_code=False).to(device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, D) float32 on the CPU, for images (N, 3, H, W), [0, 1]."""
        return torch.cat(list(self._parts(images)))

    @torch.no_grad()
    def _parts(self, images: Tensor) -> Iterator[Tensor]:
        for part in images.split(BATCH):
            pixels = self.processor([to_pil_image(image) for image in to_bytes(part).cpu()], return_tensors="pt")
            pixels = pixels["pixel_values"].to(self.model.device)
            # Two-tower models embed images in the space that they share with text; the others pool their last layer.
            if hasattr(self.model, "get_image_features"):
                found = self.model.get_image_features(pixel_values=pixels)
            else:
                found = self.model(pixel_values=pixels)
            yield _vector(found).float().cpu()


def _vector(output: Tensor | object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return pooled.flatten(1) if pooled is not None else output.last_hidden_state[:, 0]
