"""FLUX.1 Kontext: FLUX.1 that edits an image, whose tokens follow those of the result (arXiv 2506.15742)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.models.editing import SOURCE, edit_input, source_pixels, with_source
from diffalign.models.flow import image_ids, pack
from diffalign.models.flux import FluxModel
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Input


@register_family("FluxKontextPipeline")
class FluxKontextModel(FluxModel):
    """Drive a ``FluxKontextPipeline``; arguments and errors as for ``FluxModel``.

    The source is fitted to the size of the result. The pipeline does this with ``_auto_resize=False``, a source of
    that size and ``max_area`` of height times width; by default it enlarges both to about a million pixels.
    """

    edits = True
    negative_call = "image = pipe(source, {prompt}, **negative, true_cfg_scale={scale:g}, _auto_resize=False).images[0]"

    @property
    def size_arguments(self) -> Mapping[str, str]:
        """Keep the pipeline from resizing the source and the result to about a million pixels."""
        height, width = self.default_resolution
        return {"max_area": str(height * width), "_auto_resize": "False"}

    def encode_input(self, given: Input) -> Conditioning:
        """Encode an instruction and its source: "source" has latents (1, C, h, w) beside the tensors of ``encode``."""
        edit = edit_input(given)
        text = self.encode([edit.text])
        pixels = source_pixels(edit, self.source_size(edit.size or self.default_resolution)).to(self.device)
        with torch.no_grad():
            latents = self.encode_images(pixels).to(self.device)
        return Conditioning({**text.tensors, SOURCE: latents}, text.shared)

    def match_images(self, negative: Conditioning, conditioning: Conditioning) -> Conditioning:
        """Give a negative the sources of the positive."""
        return with_source(negative, conditioning)

    def _image_tokens(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        source = conditioning.tensors[SOURCE].to(x)
        own, ids = super()._image_tokens(x, conditioning)
        # The first position id tells the source from the result.
        others = image_ids(source.shape[-2] // 2, source.shape[-1] // 2, x.device, x.dtype)
        others = torch.cat([torch.ones_like(others[:, :1]), others[:, 1:]], dim=1)
        return torch.cat([own, pack(source)], dim=1), torch.cat([ids, others])
