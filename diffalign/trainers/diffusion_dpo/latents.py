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
from diffalign.models.offload import VAE
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rng import KeyedRNG
from diffalign.structures import ImageSource, LabelledImage, Pair
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig


@dataclass(frozen=True)
class Examples:
    """P examples of K images: pairs, the preferred image first, or single images.

    latents: (P, K, C, h, w). label: (P,), the probability that the first image is the preferred one; of single images
    1 for liked, 0 for disliked. texts: P prompts. sizes: per example and image, where the images are framed data.
    number: per example, what tells it from the others of its optimizer step, on all processes. weight: (P,), 1 on
    average over all processes, 0 for padding examples that equalise the number of passes per rank. mask: (P, 1, h, w)
    in [0, 1], the weight of each latent position; None: all 1.
    """

    latents: Tensor
    label: Tensor
    texts: list[str]
    number: list[int]
    weight: Tensor
    sizes: list[tuple[SizeConditioning, ...]] | None = None
    mask: Tensor | None = None


Loaded = tuple[Pair | LabelledImage, tuple[Image.Image, ...]]
KEPT = 1 << 30  # bytes of latents that stay in memory


@dataclass(frozen=True)
class _Row:
    """One example: latents (K, C, h, w), SDXL's size conditioning of each image, label, prompt, and mask (1, h, w)."""

    latents: Tensor
    sizes: tuple[SizeConditioning, ...]
    label: float
    text: str
    mask: Tensor | None


class LatentEncoder:
    """Samples with their images as examples: framed as drawn, encoded, and latents kept by what they are made of.

    share: the numbers of this process's samples among the ``num_pairs`` of an optimizer step.
    """

    def __init__(self, encoded: PromptEmbeddingCache, args: DiffusionDPOConfig, noise: KeyedRNG, share: range) -> None:
        self.model, self.cache, self.identity = encoded.model, encoded.cache, encoded.identity
        self.args, self.noise, self.share = args, noise, share
        height, width = self.model.default_resolution
        assert height == width
        self.resolution = height
        self._rows: OrderedDict[tuple[int, CropParams], _Row] = OrderedDict()

    def __call__(
        self, samples: Sequence[Callable[[], Loaded]], iteration: int, places: Sequence[int] | None = None
    ) -> Examples:
        """Examples of this process's samples, in their order.

        samples: what reads each. places: their numbers in a data set, whose samples come again every epoch: one that
        is still in memory, framed alike, is not read again.
        """
        with self.model.keeping(VAE):
            rows = [
                self._row(sample, self._framing(iteration, number), None if places is None else places[i])
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

    def _framing(self, iteration: int, number: int) -> CropParams:
        """Drawn for the sample, so that both images of a pair are cropped and mirrored alike."""
        drawn = self.noise.generator("framing", iteration, number).integers(0, DRAWS, 3).tolist()
        return CropParams.drawn(drawn, "random" if self.args.random_crop else "center", self.args.random_flip)

    def _row(self, load: Callable[[], Loaded], framing: CropParams, place: int | None) -> _Row:
        if place is None or self.args.random_crop:  # a drawn crop does not come again
            return self._made(*load(), framing)
        if (row := self._rows.get((place, framing))) is None:
            row = self._rows[place, framing] = self._made(*load(), framing)
            if len(self._rows) * row.latents.nbytes > KEPT:
                self._rows.popitem(last=False)
        return row

    def _made(self, sample: Pair | LabelledImage, images: Sequence[Image.Image], framing: CropParams) -> _Row:
        if isinstance(sample, Pair):
            images, label = images if sample.label >= 0.5 else images[::-1], max(sample.label, 1 - sample.label)
        else:
            label = float(sample.liked)
        framed = [frame(image, self.resolution, framing) for image in images]
        latents = torch.stack([self._latent(pixels) for pixels, _ in framed])
        mask = None if sample.mask is None else self._mask(sample.mask, framing, latents.shape[-2:])
        return _Row(latents, tuple(size for _, size in framed), label, sample.prompt.text, mask)

    def _mask(self, source: ImageSource, framing: CropParams, size: Sequence[int]) -> Tensor:
        """Cropped and mirrored as its images are, on the latent grid: (1, h, w)."""
        pixels, _ = frame(decode(source), self.resolution, framing)
        return latent_mask(pixels[None, :1].float() / 255, size)[0]

    @torch.no_grad()
    def _latent(self, pixels: Tensor) -> Tensor:
        key = f"latent {self.identity} {hashlib.blake2b(pixels.numpy().tobytes(), digest_size=20).hexdigest()}"
        if (kept := self.cache.get(key)) is not None:
            return kept["latent"]
        # Alone, because a batch's shape shows in the last bits, and what is kept must not depend on its neighbours.
        image = (pixels[None].float() / 255).to(self.model.device)
        latent = self.model.encode_images(image)[0].float().cpu()
        self.cache.put(key, {"latent": latent})
        return latent
