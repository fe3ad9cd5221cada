"""Qwen-Image: an MMDiT flow model conditioned on Qwen2.5-VL embeddings of the prompt (arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffalign.models.flow import JOINT_ATTENTION, PackedFlowModel, pack, unpack
from diffalign.models.offload import TEXT_ENCODERS, VAE, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning


@register_family("QwenImagePipeline")
class QwenImageModel(PackedFlowModel):
    """Drive a ``QwenImagePipeline``.

    Guidance is the pipeline's ``true_cfg_scale``, with its rescaling to the norm of the positive output.

    ``max_sequence_length`` is the number of tokens per prompt, to which shorter prompts are padded and masked. The
    pipeline's default is 512, and it pads to the longest prompt of a call, which is equivalent. ``resolution`` is as
    for ``FlowModel``, a multiple of 16 pixels.
    """

    guidance_argument = "true_cfg_scale"
    negative_text = " "  # the model card's; the pipeline does not guide without one
    negative_names: Mapping[str, str] = {"embeds": "negative_prompt_embeds", "mask": "negative_prompt_embeds_mask"}
    negative_call = "image = pipe({prompt}, **negative, true_cfg_scale={scale:g}).images[0]"
    lora_targets = JOINT_ATTENTION

    @property
    def longest_sequence(self) -> int:
        """Maximum ``max_sequence_length`` of the pipeline."""
        return 1024

    @property
    def idle_layers(self) -> tuple[str, ...]:
        """The last block's text-stream layers."""
        last = f"transformer_blocks.{len(self.raw_denoiser.transformer_blocks) - 1}"
        return f"{last}.attn.to_add_out", f"{last}.txt_mlp.net.0.proj", f"{last}.txt_mlp.net.2"

    def count_tokens(self, text: str) -> int:
        """Count tokens after the instruction, which the pipeline drops."""
        whole = self.pipeline.prompt_template_encode.format(text)
        return len(self.pipeline.tokenizer(whole).input_ids) - self.pipeline.prompt_template_encode_start_idx

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count tokens of the prompt and of what the pipeline appends to it."""
        return len(tokenizer(f"{text}<|im_end|>\n<|im_start|>assistant\n", verbose=False).input_ids)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) and mask (B, L), true for text tokens."""
        embeds, mask = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        rest = self.max_sequence_length - embeds.shape[1]
        padded = {"embeds": pad(embeds, (0, 0, 0, rest)), "mask": pad(mask.bool(), (0, rest))}
        return Conditioning(padded).to(self.device)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        dtype, tensors = self.dtype, conditioning.tensors
        height, width = x.shape[-2:]
        images = [x.to(dtype), *self._sources(conditioning)]
        output = self.denoiser(
            hidden_states=torch.cat([pack(image) for image in images], dim=1),
            # Round before dividing, as the pipeline does: the order matters in bfloat16.
            timestep=time.to(dtype) / self.num_train_timesteps,
            encoder_hidden_states=tensors["embeds"].to(dtype),
            encoder_hidden_states_mask=tensors["mask"],
            img_shapes=[[(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in images]] * len(x),
            return_dict=False,
        )[0]
        return unpack(output[:, : height * width // 4].float(), height, width)

    def _sources(self, conditioning: Conditioning) -> Sequence[Tensor]:
        """Return the latents of source images, (B, C, h, w) each; none here."""
        return ()

    def guide(self, against: Tensor, towards: Tensor, scale: float) -> Tensor:
        """Apply guidance, then rescale each token to the norm of the positive output."""
        guided = pack(super().guide(against, towards, scale))
        norm = pack(towards).norm(dim=-1, keepdim=True)
        return unpack(guided * (norm / guided.norm(dim=-1, keepdim=True)), *towards.shape[-2:])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's latents, (C, 1, 1, 1)."""
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(values).reshape(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean.to(like), std.to(like)

    @needs(VAE)
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images as single frames of the video VAE; differentiable."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype).unsqueeze(2)
        mean, std = self._statistics(latents)
        frame = vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return (frame.float() / 2 + 0.5).clamp(0, 1)

    @needs(VAE)
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images to latents, standardised per channel by the VAE's training statistics."""
        vae = self.pipeline.vae
        found = vae.encode((images * 2 - 1).to(vae.dtype).unsqueeze(2)).latent_dist
        latents = found.mean if noise is None else found.mean + found.std * noise.to(found.std).unsqueeze(2)
        mean, std = self._statistics(latents)
        return ((latents - mean) / std).squeeze(2)
