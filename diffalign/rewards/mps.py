"""MPS (arXiv 2405.14705), overall preference: CLIP's image tokens attend to the words that a condition selects.

The published file is a whole pickled module; it is read without running what it names (``support.inert_pickle``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from diffalign.rewards.base import Metadata, RewardCard, RewardUnavailable, register
from diffalign.rewards.clip import VIT_H
from diffalign.rewards.support.inert_pickle import tensors_of
from diffalign.rewards.support.preprocess import Preprocess, at_least_float32, on_images, should_quantize
from diffalign.rewards.support.prompts import unique_prompts
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, pinned, weights_file

FILE = "MPS_overall_checkpoint.pth"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
LAYERS, HEAD = 4, 64  # cross-attention layers, and width of their heads


class ScaleNorm(nn.Module):
    """Layer norm whose bias is a constant zero that is stored with the weights."""

    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, N, D)."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class SwiGLU(nn.Module):
    """Multiply the first half by the SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, 2 D) to (B, N, D)."""
        value, gate = x.chunk(2, -1)
        return F.silu(gate) * value


class Rotary(nn.Module):
    """Rotary positions; the frequencies are stored with the weights."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate (..., N, HEAD)."""
        angles = torch.arange(x.shape[-2], device=x.device, dtype=self.inv_freq.dtype)[:, None] * self.inv_freq
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with many query heads (B, H, N, d) to one key and value head (B, L, d)."""
    key, value = (part[:, None].expand(-1, query.shape[1], -1, -1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens; a feed-forward layer runs in parallel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, ScaleNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, heads * HEAD, bias=False), nn.Linear(width, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False), SwiGLU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Map image tokens (B, N, D) for text tokens (B, L, D), of which ``seen`` (B, L) are attended to."""
        x = self.norm(x)
        key, value = self.to_kv(text).chunk(2, -1)
        found = _attend(_heads(self.to_q(x), self.heads), key, value, seen[:, None, None])
        return self.to_out(found) + self.ff(x)


class ParallelBlock(nn.Module):
    """Self-attention of image tokens, and a feed-forward layer in parallel, from one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.rotary_emb = heads, ScaleNorm(width), Rotary()
        self.sizes = (heads * HEAD, HEAD, HEAD, 8 * width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        query, key, value, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, -1)
        query, key = self.rotary_emb(_heads(query, self.heads)), self.rotary_emb(key)
        return self.attn_out(_attend(query, key, value)) + self.ff_out(inner)


class Network(nn.Module):
    """CLIP and the cross-attention layers; parameter names match the published module."""

    def __init__(self, clip: CLIPConfig) -> None:
        super().__init__()
        width = clip.projection_dim
        self.model = CLIPModel(clip)
        pairs = (
            nn.ModuleList(
                [nn.ModuleDict({"fn": kind(width, width // HEAD)}) for kind in (CrossAttention, ParallelBlock)]
            )
            for _ in range(LAYERS)
        )
        self.cross_model = nn.ModuleDict({"layers": nn.ModuleList(pairs)})

    def words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embed all tokens (B, L, D), and the end token (B, D), of token ids (B, L)."""
        found = self.model.text_model(input_ids=ids)
        return self.model.text_projection(found.last_hidden_state), self.model.text_projection(found.pooler_output)

    def forward(self, pixels: Tensor, words: Tensor, end: Tensor, seen: Tensor) -> Tensor:
        """Score pixels (B, 3, S, S) for words (B, L, D), those ``seen`` (B, L), and end tokens (B, D): (B,)."""
        x = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)
        layers: Any = self.cross_model["layers"]
        for cross, block in layers:
            x = x + cross["fn"](x, words, seen)
            x = x + block["fn"](x)
        cosine = (F.normalize(x[:, 0], dim=-1) * F.normalize(end, dim=-1)).sum(-1)
        return self.model.logit_scale.exp() * cosine


def selected(words: Tensor, condition: Tensor, threshold: float) -> Tensor:
    """Select words (B, L, D) by their greatest product with a condition's words (C, D), relative to the row's maximum.

    The published code takes the maximum over the whole batch, which makes a score depend on its neighbours.
    """
    similarity = (words @ condition.T).amax(-1)
    return similarity / similarity.amax(-1, keepdim=True) > threshold


def _load(weights: Weights, clip: str) -> tuple[Network, Any]:
    network = Network(CLIPConfig.from_pretrained(**pinned(clip)))
    tensors = tensors_of(weights_file(weights, FILE))
    network.load_state_dict({name: tensors[name] for name in tensors if not name.endswith("position_ids")})
    return frozen(network, weights), AutoTokenizer.from_pretrained(**pinned(clip), trust_remote_code=False)


@dataclass(frozen=True)
class MpsReward:
    """Predict human preference: exp(logit_scale) times a cosine, as PickScore, of an image seen through its prompt.

    Args:
        name: under which scores are stored.
        weights: of the network; the path is a file of the user's, or a folder with it.
        clip: folder, or hub id with or without @revision, of CLIP ViT-H-14, for configuration and tokenizer.
        condition: words of the aspects to judge; the default is the published one for overall preference.
        threshold: share of the greatest similarity to the condition above which a word of the prompt counts; 0.3 as in
            the published evaluation, 0.01 in training.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    clip: str = VIT_H
    condition: str = CONDITION
    threshold: float = 0.3
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-100.0, 100.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        if not self.weights.path:
            raise RewardUnavailable(
                f"its weights are in no hub repository: download {FILE} as the README of Kwai-Kolors/MPS says, and set "
                "options: {path: FILE}"
            )
        network, tokenizer = load_once(_load, self.weights, self.clip)
        once, rows = unique_prompts(prompts)
        length = min(77, network.model.config.text_config.max_position_embeddings)
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer([*once, self.condition], **options).input_ids.to(images.device)
        step = Preprocess(goal=network.model.config.vision_config.image_size)
        with on_device(network, self.weights, images.device):
            with torch.no_grad():
                words, end = network.words(ids)
                seen = selected(words[:-1], words[-1], self.threshold)
            pixels = step(images, quantize=should_quantize(self.quantize, images)).to(self.weights.dtype)
            return at_least_float32(network(pixels, words[rows], end[rows], seen[rows]))


FACTS = RewardCard("human preference", 0.3, "arXiv 2405.14705", "MPS_overall_checkpoint.pth", "MIT (its code)", 1105)


@register("mps", FACTS)
def mps(
    name: str,
    path: str = "",
    clip: str = VIT_H,
    condition: str = CONDITION,
    threshold: float = 0.3,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> MpsReward:
    """Build the published model from a downloaded file."""
    return MpsReward(name, Weights(path, None, precision, offload), clip, condition, threshold, quantize)
