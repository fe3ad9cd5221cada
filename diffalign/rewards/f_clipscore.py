"""F-CLIPScore (arXiv 2412.18404): a training-free penalty for words that CLIP does not find in an image.

The attribution of a word is the attention of the caption's last token to the word, times the gradient of the cosine of
image and caption with respect to that attention. A negative attribution marks a word that the image does not show.
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
LAYERS = 3  # last layers of the text encoder, whose attention maps are averaged
THRESHOLD = -5e-5
PUNCTUATION = frozenset('.,!"?;:')  # not scored when it stands alone as a word


def _load(weights: Weights) -> tuple[CLIPModel, Any]:
    model = load_clip(weights.path, weights.revision, attn_implementation="eager")
    return frozen(model, weights), AutoTokenizer.from_pretrained(
        weights.path, revision=weights.revision, trust_remote_code=False
    )


def attributions(model: CLIPModel, ids: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attributions of tokens, averaged over heads and the last ``LAYERS`` layers.

    The attention row used is that of the caption's last token, whose state is the text embedding.

    Args:
        model: CLIP with eager attention.
        ids: caption tokens (B, L).
        mask: attention mask (B, L).
        image: unit image embeddings (B, D).

    Returns:
        Attributions (B, L), and cosines (B,) of captions and images.
    """
    with torch.inference_mode(False), torch.enable_grad():
        image = image if image.requires_grad else image.clone()  # autograd refuses inference tensors
        # All weights are frozen: attention maps get a graph only from inputs that require grad.
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
    """List the token indices of each word; words that are punctuation alone are dropped."""
    encoded = tokenizer(TEMPLATE + caption, truncation=True, max_length=longest, return_offsets_mapping=True)
    spans = [(found.start() + len(TEMPLATE), found.group()) for found in re.finditer(r"[.,]|[^ .,]+", caption)]
    tokens: list[list[int]] = [[] for _ in spans]
    for index, (begin, end) in enumerate(encoded.offset_mapping):
        if begin < end:
            own = [i for i, (start, word) in enumerate(spans) if start <= begin < start + len(word)]
            for i in own:
                tokens[i].append(index)
    return [indices for indices, (_, word) in zip(tokens, spans, strict=True) if indices and word not in PUNCTUATION]


@dataclass(frozen=True)
class FClipScore:
    """Sum the word attributions below ``THRESHOLD``, times 1 - max(cosine, 0); 0 if there are none.

    Departures from the published code: 1. it computes in float16, this in the precision of ``weights``; 2. tokens are
    assigned to words by the tokenizer's offsets.
    """

    name: str
    weights: Weights
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, 0.0)

    @on_images("worst")
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device.

        The extra "worst" (B,) is the lowest attribution of a word, 0 for a prompt without words.
        """
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
            words = [row[indices].mean() for indices in words_of(tokenizer, prompt, longest)] or [row.new_zeros(())]
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
    """Build the reward on the published backbone, or on any transformers CLIP folder at ``path``."""
    return FClipScore(name, Weights(path, revision, precision, offload), quantize)
