"""Qwen-Image-Edit: Qwen-Image that edits an image, seen by its VAE and by its vision-language encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from diffalign.models.editing import SOURCE, edit_input, pixels_of, source_image
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.qwen_image import QwenImageModel
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Input

AREA = 1024 * 1024  # pixels of the source, whatever the size of the result, as in the pipeline
NEGATIVE = ("negative_embeds", "negative_mask")


@register_family("QwenImageEditPipeline")
class QwenImageEditModel(QwenImageModel):
    """Drive a ``QwenImageEditPipeline``; otherwise as ``QwenImageModel``.

    The source is cropped to the aspect ratio of the result, and then has about a million pixels, as in the pipeline.
    The negative prompt of guidance is encoded with the source too, so a conditioning brings its own negative.
    """

    edits = True
    empty_text = " "
    negative_call = "image = pipe(source, {prompt}, **negative, true_cfg_scale={scale:g}).images[0]"

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that the pipeline resizes a source of this aspect ratio to."""
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(AREA, size[1] / size[0])
        return height, width

    def encode_input(self, given: Input) -> Conditioning:
        """Encode an instruction, the negative prompt and the source.

        Embeddings (1, L, D) and masks (1, L) of both texts; "source", latents (1, C, h, w).
        """
        edit = edit_input(given)
        image = source_image(edit, self.source_size(edit.size or self.default_resolution))
        (embeds, mask), negative = self._seen(edit.text, image), self._seen(self.empty_text, image)
        with torch.no_grad():
            latents = self.encode_images(pixels_of(image).to(self.device))
        own = {"embeds": embeds, "mask": mask, SOURCE: latents, **dict(zip(NEGATIVE, negative, strict=True))}
        return Conditioning(own).to(self.device)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def _seen(self, text: str, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Encode a text with an image by the pipeline; pad to ``max_sequence_length`` text tokens."""
        pipeline = self.pipeline
        embeds, mask = pipeline.encode_prompt([text], image=[image], device=pipeline.text_encoder.device)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        rest = self.max_sequence_length - self.count_tokens(text)
        end = embeds.shape[1] + min(rest, 0)
        return pad(embeds[:, :end], (0, 0, 0, max(rest, 0))), pad(mask[:, :end].bool(), (0, max(rest, 0)))

    def count_tokens(self, text: str) -> int:
        """Count the tokens of the text itself, without template and image."""
        return len(self.pipeline.tokenizer(text).input_ids)

    def unconditional(self) -> Conditioning:
        """Return a placeholder of one row: each conditioning has its own negative (see ``match_images``)."""
        return Conditioning({"placeholder": torch.zeros(1, 1)}).to(self.device)

    def match_images(self, negative: Conditioning, conditioning: Conditioning) -> Conditioning:
        """Return the negatives that were encoded with the sources."""
        tensors = conditioning.tensors
        embeds, mask = (tensors[name] for name in NEGATIVE)
        return Conditioning({"embeds": embeds, "mask": mask, SOURCE: tensors[SOURCE]})

    def _sources(self, conditioning: Conditioning) -> Sequence[Tensor]:
        return (conditioning.tensors[SOURCE].to(self.dtype),)
