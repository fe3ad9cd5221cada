"""Encode preference data to latents: pairs or single images."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.crops import DRAWS, CropParams, SizeConditioning, frame
from diffalign.data.images import decode
from diffalign.losses.errors import latent_mask
from diffalign.models.editing import check_source_column, sized_input
from diffalign.models.offload import VAE
from diffalign.runtime.run import Run
from diffalign.structures import ImageSource, Input, LabelledImage, Pair
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig


@dataclass(frozen=True)
class Examples:
    """P examples of K images: pairs, the preferred image first, or single images.

    Attributes:
        latents: (P, K, C, *spatial).
        label: (P,), probability that the first image is preferred; for single images 1 if liked, 0 if disliked.
        texts: P prompts, with source images for models that edit.
        number: P integers that identify the examples of an optimizer step over all processes.
        weight: (P,), 1 on average over all processes, 0 for padding that equalises the passes of each process.
        sizes: Crop and original size of each image of each example; None for images that the model sampled.
        mask: (P, 1, *spatial) in [0, 1], weight of each latent position; None: all 1.
    """

    latents: Tensor
    label: Tensor
    texts: list[Input]
    number: list[int]
    weight: Tensor
    sizes: list[tuple[SizeConditioning, ...]] | None = None
    mask: Tensor | None = None


Loaded = tuple[Pair | LabelledImage, tuple[Image.Image, ...]]
KEPT = 1 << 30  # bytes of latents that stay in memory


@dataclass(frozen=True)
class _Row:
    """One example: latents (K, C, *spatial), size conditioning of each image, label, prompt, and mask (1, *spatial)."""

    latents: Tensor
    sizes: tuple[SizeConditioning, ...]
    label: float
    text: Input
    mask: Tensor | None


class LatentEncoder:
    """Crop, flip and encode the images of samples; latents are cached by the digest of their pixels.

    Attributes:
        share: Indices of this process's samples among the ``num_pairs`` of an optimizer step.
    """

    def __init__(self, run: Run[DiffusionDPOConfig]) -> None:
        moved = [name for name in ("random_crop", "random_flip") if getattr(run.config, name)]
        if moved and run.model.edits:
            raise ValueError(f"{' and '.join(moved)}: the sources that a model edits would stay as they are; leave out")
        check_source_column(run.model, run.config.data.source)
        self.model, self.cache, self.identity = run.model, run.prompts.cache, run.prompts.identity
        self.config, self.rng, self.share = run.config, run.rng, run.share(run.config.num_pairs)
        self._rows: OrderedDict[tuple[int, CropParams, tuple[int, int]], _Row] = OrderedDict()

    def __call__(
        self,
        samples: Sequence[Callable[[], Loaded]],
        iteration: int,
        indices: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Examples:
        """Encode this process's samples, in order.

        Args:
            samples: Functions that read a sample and its images.
            iteration: Index of the optimizer step, which keys crops and flips.
            indices: Index of each sample in its data set; samples of earlier epochs that are still in memory, cropped
                alike, are not read again. None: do not keep them.
            size: (height, width) to crop to; default: the model's.
        """
        size = size or self.model.default_resolution
        with self.model.keeping(VAE):
            rows = [
                self._row(sample, self._crop(iteration, number), size, None if indices is None else indices[i])
                for i, (number, sample) in enumerate(zip(self.share, samples, strict=True))
            ]
        label = torch.tensor([row.label for row in rows])
        everywhere = torch.ones_like(rows[0].latents[0, :1])
        masks = [everywhere if row.mask is None else row.mask for row in rows]
        return Examples(
            torch.stack([row.latents for row in rows]),
            label,
            [row.text for row in rows],
            list(self.share),
            torch.ones_like(label),
            [row.sizes for row in rows],
            None if all(row.mask is None for row in rows) else torch.stack(masks),
        )

    def _crop(self, iteration: int, number: int) -> CropParams:
        """Draw crop and flip of a sample; both images of a pair share them."""
        drawn = self.rng.generator("framing", iteration, number).integers(0, DRAWS, 3).tolist()
        return CropParams.drawn(drawn, "random" if self.config.random_crop else "center", self.config.random_flip)

    def _row(self, load: Callable[[], Loaded], crop: CropParams, size: tuple[int, int], index: int | None) -> _Row:
        if index is None or self.config.random_crop:  # random crops do not repeat
            return self._encode(*load(), crop, size)
        if (row := self._rows.get((index, crop, size))) is None:
            row = self._rows[index, crop, size] = self._encode(*load(), crop, size)
            if len(self._rows) * row.latents.nbytes > KEPT:
                self._rows.popitem(last=False)
        return row

    def _encode(
        self, sample: Pair | LabelledImage, images: Sequence[Image.Image], crop: CropParams, size: tuple[int, int]
    ) -> _Row:
        if isinstance(sample, Pair):
            images, label = images if sample.label >= 0.5 else images[::-1], max(sample.label, 1 - sample.label)
        else:
            label = float(sample.liked)
        framed = [frame(image, size, crop) for image in images]
        latents = torch.stack([self._latent(pixels) for pixels, _ in framed])
        mask = None if sample.mask is None else self._mask(sample.mask, crop, size, latents.shape[-2:])
        return _Row(
            latents, tuple(sizes for _, sizes in framed), label, sized_input(self.model, sample.prompt, size), mask
        )

    def _mask(self, source: ImageSource, crop: CropParams, size: tuple[int, int], grid: Sequence[int]) -> Tensor:
        """Crop and flip a mask as its images, and resize it to the latent grid: (1, h, w)."""
        pixels, _ = frame(decode(source), size, crop)
        return latent_mask(pixels[None, :1].float() / 255, grid)[0]

    @torch.no_grad()
    def _latent(self, pixels: Tensor) -> Tensor:
        content = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=20).hexdigest()
        # A white image has the same bytes in any shape.
        key = f"latent {self.identity} {tuple(pixels.shape)} {content}"
        if (kept := self.cache.get(key)) is not None:
            return kept["latent"]
        # One at a time: the batch shape changes the last bits, and a cached latent must not depend on its neighbours.
        image = (pixels[None].float() / 255).to(self.model.device)
        latent = self.model.encode_images(image)[0].float().cpu()
        self.cache.put(key, {"latent": latent})
        return latent
