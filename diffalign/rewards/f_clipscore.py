"""F-CLIPScore (arXiv 2412.18404): what the words that CLIP finds missing in an image cost it; needs no training.

A word's attribution is the cosine of image and caption, differentiated by the attention that the caption's last token
pays to the word, times that attention. Words with a negative attribution are those that the image does not show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from diffalign.rewards.base import Extras, Metadata, RewardCard, register
from diffalign.rewards.clip import CAPTION, VIT_H, image_embeddings, load_clip
from diffalign.rewards.support.preprocess import at_least_float32, centre_round, on_images, should_quantize, wants_grad
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device

TEMPLATE = CAPTION
LAYERS = 3  # the last ones of the text encoder, whose attentions count
THRESHOLD = -5e-5
PUNCTUATION = frozenset('.,!"?;:')  # as a word of its own


def _load(weights: Weights) -> tuple[CLIPModel, Any]:
    model = load_clip(weights.path, weights.revision, attn_implementation="eager")
    return frozen(model, weights), AutoTokenizer.from_pretrained(
        weights.path, revision=weights.revision, trust_remote_code=False
    )


def attributions(model: CLIPModel, ids: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Per token (B, L), and the cosines (B,), of captions and unit image embeddings (B, D).

    The mean over the last layers and all heads; the row is that of the token whose embedding is the caption's.
    """
    with torch.inference_mode(False), torch.enable_grad():
        image = image if image.requires_grad else image.clone()  # one of inference mode cannot be differentiated by
        # The encoder's inputs need a gradient for its attentions to have one: all weights are frozen.
        embeds = model.text_model.embeddings(input_ids=ids).detach().requires_grad_()
        hook = model.text_model.embeddings.register_forward_hook(lambda *_: embeds)
        try:
            output = model.text_model(input_ids=ids, attention_mask=mask, output_attentions=True)
        finally:
            hook.remove()
        text = F.normalize(model.text_projection(output.pooler_output), dim=-1)
        cosine = (text * image).sum(-1)
        attentions = output.attentions[-LAYERS:]
        slopes = torch.autograd.grad(cosine.sum(), attentions, create_graph=image.requires_grad)
    last = mask.sum(-1) - 1
    own = torch.arange(len(ids), device=ids.device)
    maps = [(slope * attention).mean(1)[own, last] for slope, attention in zip(slopes, attentions, strict=True)]
    return torch.stack(maps).mean(0), cosine


def words_of(tokenizer: Any, caption: str, longest: int) -> list[list[int]]:
    """The places of each word's tokens; full stops and commas are words, then left out with other punctuation."""
    encoded = tokenizer(TEMPLATE + caption, truncation=True, max_length=longest, return_offsets_mapping=True)
    spans = [(found.start() + len(TEMPLATE), found.group()) for found in re.finditer(r"[.,]|[^ .,]+", caption)]
    places: list[list[int]] = [[] for _ in spans]
    for place, (begin, end) in enumerate(encoded.offset_mapping):
        if begin < end:
            own = [i for i, (start, word) in enumerate(spans) if start <= begin < start + len(word)]
            for i in own:
                places[i].append(place)
    return [found for found, (_, word) in zip(places, spans, strict=True) if found and word not in PUNCTUATION]


@dataclass(frozen=True)
class FClipScore:
    """The sum of the words' attributions below ``THRESHOLD``, times 1 - max(cosine, 0): at most 0, where none is.

    Departures from the published code: 1. it computes in float16, this in the precision of ``weights``; 2. words are
    told apart by the tokenizer's own offsets.
    """

    name: str
    weights: Weights
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, 0.0)

    @on_images("worst")
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device; extra "worst": the lowest word's
        attribution (B,), 0 for a prompt without words."""
        model, tokenizer = load_once(_load, self.weights)
        quantize = should_quantize(self.quantize, images)
        longest = min(77, model.config.text_config.max_position_embeddings)
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = tokenizer([TEMPLATE + prompt for prompt in prompts], **options).to(images.device)
        with on_device(model, self.weights, images.device):
            image = image_embeddings(model, images, quantize, centre_round)
            per_token, cosine = attributions(model, tokens.input_ids, tokens.attention_mask, image)
        scores, worst = [], []
        for row, prompt in zip(per_token, prompts, strict=True):
            words = [row[places].mean() for places in words_of(tokenizer, prompt, longest)] or [row.new_zeros(())]
            values = torch.stack(words)
            scores.append((values * (values < THRESHOLD)).sum())
            worst.append(values.min())
        result = torch.stack(scores) * (1 - cosine.clamp(min=0))
        if not wants_grad(images):
            result = result.detach()
        return at_least_float32(result), {"worst": at_least_float32(torch.stack(worst).detach())}


FACTS = RewardCard("words that the image does not show", 1e-4, "arXiv 2412.18404", VIT_H, "MIT", 986)


@register("f_clipscore", FACTS)
def f_clipscore(
    name: str,
    path: str = FACTS.weights,
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> FClipScore:
    """On the published backbone, or on any transformers CLIP folder under ``path``."""
    return FClipScore(name, Weights(path, revision, precision, offload), quantize)
