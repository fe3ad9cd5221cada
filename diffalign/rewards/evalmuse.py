"""FGA-BLIP2 of EvalMuse-40K (arXiv 2412.18150): BLIP-2's Q-Former rates how well an image matches its prompt.

The published file has the layer names of LAVIS; they are converted to those of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2Config, Blip2ForImageTextRetrieval

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import Preprocess, at_least_float32, on_images, should_quantize, stretch
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, pinned, state_dict

FILE = "fga_blip2.pth"
HEAD_WIDTH = {"vision": 88, "qformer": 64}  # of attention heads: 16 of EVA-CLIP-g, 12 of BERT
MAX_WORDS = 50
START = "[DEC]"  # added to BERT's vocabulary
PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
# Not used for the score of the whole prompt.
UNUSED = ("Qformer.cls.", "vision_proj.", "text_proj.", "mask_proj.", "temp", "Qformer.bert.embeddings.position_ids")

# Substrings of published names -> names of transformers, applied in this order.
NAMES = {
    "visual_encoder.": "vision_model.",
    "vision_model.cls_token": "vision_model.embeddings.class_embedding",
    "vision_model.pos_embed": "vision_model.embeddings.position_embedding",
    "vision_model.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "vision_model.blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv": ".self_attn.qkv",
    ".attn.proj": ".self_attn.projection",
    "ln_vision.": "vision_model.post_layernorm.",
    "Qformer.bert.embeddings.LayerNorm.": "qformer.layernorm.",
    "Qformer.bert.embeddings.": "embeddings.",
    "Qformer.bert.": "qformer.",
    "attention.self.": "attention.attention.",
}


def renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert published weights to transformers' names; keys have no bias in EVA's joint projection."""
    result = {}
    for name, tensor in published.items():
        if name.startswith(UNUSED) or name.endswith(".attn.v_bias"):
            continue
        if name.endswith(".attn.q_bias"):
            tensor = torch.cat([tensor, torch.zeros_like(tensor), published[name.replace("q_bias", "v_bias")]])
            name = name.replace("q_bias", "qkv.bias")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def config_of(weights: Mapping[str, Tensor]) -> Blip2Config:
    """Infer the configuration from the shapes of renamed weights."""
    width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    patches = weights["vision_model.embeddings.position_embedding"].shape[1] - 1
    vocabulary, inner = weights["embeddings.word_embeddings.weight"].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": len(weights["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _depth(weights, "vision_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_WIDTH["vision"]),
        "image_size": round(patches**0.5) * patch,
        "patch_size": patch,
    }
    qformer = {
        "hidden_size": inner,
        "intermediate_size": len(weights["qformer.encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": _depth(weights, "qformer.encoder.layer."),
        "num_attention_heads": max(1, inner // HEAD_WIDTH["qformer"]),
        "max_position_embeddings": len(weights["embeddings.position_embeddings.weight"]),
        "encoder_hidden_size": width,
        "vocab_size": vocabulary,
        "use_qformer_text_input": True,
    }
    queries = weights["query_tokens"].shape[1]
    return Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=queries, image_text_hidden_size=8)


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


class Network(nn.Module):
    """EVA's vision transformer, and a Q-Former that reads image and text together."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        whole = Blip2ForImageTextRetrieval(config)
        self.vision_model, self.qformer, self.embeddings = whole.vision_model, whole.qformer, whole.embeddings
        self.query_tokens, self.itm_head = whole.query_tokens, whole.itm_head
        self.vision_model.post_layernorm.eps = 1e-5  # LAVIS's norm after the vision transformer; 1e-6 within it

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the probability of a match at each query token, (B, Q), for tokens and their mask (B, L)."""
        image = self.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        found = self.qformer(
            query_embeds=self.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], 1),
            encoder_hidden_states=image,
            encoder_attention_mask=mask.new_ones(image.shape[:2]),
        ).last_hidden_state
        return at_least_float32(self.itm_head(found[:, : queries.shape[1]])).softmax(-1)[..., 1]


def caption(prompt: str) -> str:
    """Prepare a prompt as LAVIS does: lower case, without some punctuation, at most 50 words."""
    text = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", prompt.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


def _load(weights: Weights, tokenizer: str) -> tuple[Network, Any]:
    found = state_dict(weights, FILE)
    tensors = renamed(found.get("model", found))  # type: ignore[arg-type]  # LAVIS nests the weights
    network = Network(config_of(tensors))
    network.load_state_dict(tensors)
    words = AutoTokenizer.from_pretrained(**pinned(tokenizer), trust_remote_code=False)
    words.add_special_tokens({"bos_token": START})
    return frozen(network, weights), words


@dataclass(frozen=True)
class EvalMuseReward:
    """Rate how well an image matches its prompt, from 1 to 5: the mean over query tokens, 1 + 4 p.

    Args:
        name: under which scores are stored.
        weights: of the network.
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
    range: tuple[float, float] = (1.0, 5.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        network, tokenizer = load_once(_load, self.weights, self.tokenizer)
        step = Preprocess(goal=network.vision_model.config.image_size, fit=stretch)
        longest = network.qformer.config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = tokenizer([caption(prompt) for prompt in prompts], **options).to(images.device)
        with on_device(network, self.weights, images.device):
            pixels = step(images, quantize=should_quantize(self.quantize, images)).to(self.weights.dtype)
            return network(pixels, tokens.input_ids, tokens.attention_mask).mean(1) * 4 + 1


FACTS = RewardCard(
    "whether the image shows the text", 0.1, "arXiv 2412.18150", "hanshuhao/FGA-BLIP2", "Apache-2.0", 1172
)


@register("evalmuse", FACTS)
def evalmuse(
    name: str,
    path: str = FACTS.weights,
    tokenizer: str = "google-bert/bert-base-uncased",
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> EvalMuseReward:
    """Build the published model, or one from the same file in a folder ``path``."""
    return EvalMuseReward(name, Weights(path, revision, precision, offload), tokenizer, quantize)
