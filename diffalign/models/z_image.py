"""Z-Image: a single-stream flow model on FLUX.1's VAE, with Qwen3 as text encoder (arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffalign.models.flow import FlowModel
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning


@register_family("ZImagePipeline")
class ZImageModel(FlowModel):
    """Drive a ``ZImagePipeline``: Z-Image and Z-Image-Turbo.

    ``max_sequence_length`` is the number of tokens per prompt, chat template included; the pipeline's default is 512.
    ``resolution`` is as for ``FlowModel``, multiples of 16 pixels; default 1024, as in the pipeline.

    Guidance is positive + scale * (positive - negative), as in the pipeline: 0 turns it off, and 1 equals 2 in other
    families. The transformer takes lists of prompts of any length, so each call syncs once for their lengths.
    """

    unguided_scale = 0.0

    # The pipeline takes a list of unpadded embeddings.
    negative_call = (
        "negative = {{name: list(rows) for name, rows in negative.items()}}\n"
        "image = pipe({prompt}, **negative, guidance_scale={scale:g}).images[0]"
    )
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    @property
    def longest_sequence(self) -> int:
        """Positions of the text encoder; the pipeline sets no maximum."""
        return self.pipeline.text_encoder.config.max_position_embeddings

    @property
    def default_resolution(self) -> tuple[int, int]:
        """``resolution``, or 1024."""
        return self.resolution or (1024, 1024)

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count tokens, including the chat template."""
        message = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return len(tokenizer(whole, verbose=False).input_ids)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline and pad: embeddings (B, L, D) and length (B,), the number of text tokens."""
        found, _ = self.pipeline.encode_prompt(
            list(texts),
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        embeds = torch.stack([pad(e, (0, 0, 0, self.max_sequence_length - len(e))) for e in found])
        return Conditioning({"embeds": embeds, "length": torch.tensor([len(e) for e in found])}).to(self.device)

    def negative_arguments(self, row: Conditioning) -> dict[str, Tensor]:
        """Return the negative embeddings without padding, (1, length, D)."""
        named = super().negative_arguments(row)
        return {name: embeds[:, : int(row.tensors["length"])] for name, embeds in named.items()}

    def guide(self, against: Tensor, towards: Tensor, scale: float) -> Tensor:
        """Combine a negative and a positive output, as the pipeline does at ``scale``."""
        return towards + scale * (towards - against)

    def guidance_factor(self, scale: float | None) -> float:
        """Return the weight of the positive output at ``scale``; 1 without guidance."""
        return 1 + float(scale) if scale is not None and self.guides(scale) else 1.0

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper.

        Its time runs from 0 at pure noise to 1, and its output is x0 - noise.
        """
        tensors, end = conditioning.tensors, self.num_train_timesteps
        embeds = tensors["embeds"].to(self.dtype)
        prompts = [e[:length] for e, length in zip(embeds, tensors["length"].tolist(), strict=True)]
        latents = list(x.to(self.dtype).unsqueeze(2).unbind())
        output = self.denoiser(latents, (end - time) / end, prompts, return_dict=False)[0]
        return -torch.stack([o.float() for o in output]).squeeze(2)
