"""ImageReward (arXiv 2304.05977): BLIP's text encoder attends to the image; a head scores its first token.

The published ``ImageReward.pt`` has the original BLIP layer names; they are converted to those of transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diffalign.rewards.aesthetic import Head
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import Preprocess, at_least_float32, centre_round, on_images, should_quantize
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, pinned, state_dict, weights_file

FILE, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' data
TOKENS = 35
HEAD_WIDTH = 64  # of attention heads in BLIP's vision transformers
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

# Substrings of published names -> names of transformers, applied in this order.
NAMES = {
    "blip.visual_encoder.": "vision.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.layers.",
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj": "vision.embeddings.patch_embedding",
    "vision.norm.": "vision.post_layernorm.",
    "vision.blocks.": "vision.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


class Network(nn.Module):
    """BLIP's image and text encoders, and the score head."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = Head(text.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Score pixels (B, 3, S, S) for tokens and their mask (B, L): (B,)."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return (self.head(text[:, 0]) - MEAN) / STD


def renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert published weights to the parameter names of ``Network``."""
    result = {}
    for name, tensor in published.items():
        if not name.startswith(UNUSED):
            for old, new in NAMES.items():
                name = name.replace(old, new)
            result[name] = tensor
    return result


def vision_config(weights: dict[str, Tensor]) -> BlipVisionConfig:
    """Infer the vision configuration from the shapes of renamed weights."""
    width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
    patches = weights["vision.embeddings.position_embedding"].shape[1] - 1
    layers = {name.split(".")[3] for name in weights if name.startswith("vision.encoder.layers.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(published: dict[str, Any], image_width: int) -> BlipTextConfig:
    """Convert ``med_config.json`` to a text configuration with cross-attention to ``image_width`` features."""
    shared = {name: published[name] for name in published if hasattr(BlipTextConfig(), name)}
    shared.pop("model_type", None)
    return BlipTextConfig(**{**shared, "encoder_hidden_size": image_width, "is_decoder": True})


def _load(weights: Weights, tokenizer: str) -> tuple[Network, Any]:
    tensors = renamed(state_dict(weights, FILE))
    vision = vision_config(tensors)
    text = text_config(json.loads(weights_file(weights, TEXT_CONFIG).read_text()), vision.hidden_size)
    network = Network(vision, text)
    network.load_state_dict(tensors)
    return frozen(network, weights), AutoTokenizer.from_pretrained(**pinned(tokenizer), trust_remote_code=False)


@dataclass(frozen=True)
class ImageReward:
    """Predict human preference; mean 0 and standard deviation 1 on the authors' data, about -2.3 to 2.

    Prompts are truncated to 35 tokens.

    Args:
        name: under which scores are stored.
        weights: folder or repository of the checkpoint and its text configuration.
        tokenizer: folder, or hub id with or without @revision, of BERT's tokenizer.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    tokenizer: str
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        network, tokenizer = load_once(_load, self.weights, self.tokenizer)
        quantize = should_quantize(self.quantize, images)
        step = Preprocess(goal=network.vision.config.image_size, crop=centre_round)
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = tokenizer(list(prompts), **options).to(images.device)
        with on_device(network, self.weights, images.device):
            pixels = step(images, quantize=quantize).to(self.weights.dtype)
            return at_least_float32(network(pixels, tokens.input_ids, tokens.attention_mask))


FACTS = RewardCard("human preference", 0.1, "arXiv 2304.05977", "THUDM/ImageReward", "Apache-2.0", 446)


@register("image_reward", FACTS)
def image_reward(
    name: str,
    path: str = FACTS.weights,
    tokenizer: str = "google-bert/bert-base-uncased",
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> ImageReward:
    """Build the published model, or one from the same files in a folder ``path``."""
    return ImageReward(name, Weights(path, revision, precision, offload), tokenizer, quantize)
