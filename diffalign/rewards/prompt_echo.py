"""PromptEcho (arXiv 2604.12652): how likely a frozen vision-language model repeats the prompt given the image.

The score is minus the cross-entropy of the prompt's tokens as the answer to a fixed question, averaged over tokens. The
paper's wording of the question is not public; the default is the one that its summaries quote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import at_least_float32, on_images, should_quantize
from diffalign.rewards.support.prompts import escape_special_tokens
from diffalign.rewards.support.qwen_vl import answer_logits, load_with_own_limits
from diffalign.rewards.support.weights import Weights, load_once

QUESTION = "Describe this image in detail."


@dataclass(frozen=True)
class PromptEcho:
    """Mean log-probability of the prompt's tokens, teacher-forced; NaN for a prompt without tokens.

    Args:
        name: under which scores are stored.
        weights: of a Qwen vision-language model.
        question: that the prompt answers.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    question: str = QUESTION
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, 0.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        loaded = load_once(load_with_own_limits, self.weights)
        tokenizer, quantize = loaded[1], should_quantize(self.quantize, images)
        escaped = [escape_special_tokens(tokenizer, prompt) for prompt in prompts]
        answers = [tokenizer(text, add_special_tokens=False).input_ids for text in escaped]
        texts = [self.question] * len(images)
        logits = answer_logits(loaded, self.weights, images, texts, quantize=quantize, answers=answers)
        scores = []
        for row, answer in zip(logits, answers, strict=True):
            # The last logits follow the answer; those before predict its tokens.
            log_probs = at_least_float32(row[len(row) - 1 - len(answer) : -1]).log_softmax(-1)
            target = torch.tensor(answer, dtype=torch.long, device=row.device)
            scores.append(log_probs.gather(-1, target[:, None]).mean())
        return torch.stack(scores)


FACTS = RewardCard(
    "whether the image shows the text", 0.05, "arXiv 2604.12652", "Qwen/Qwen3-VL-8B-Instruct", "Apache-2.0", 8770
)


@register("prompt_echo", FACTS)
def prompt_echo(
    name: str,
    path: str = FACTS.weights,
    question: str = QUESTION,
    revision: str | None = None,
    precision: str = "bf16",
    offload: bool = False,
    quantize: bool | None = None,
) -> PromptEcho:
    """Build the reward on Qwen3-VL-8B, or on another Qwen model at ``path``, such as the paper's 32B."""
    return PromptEcho(name, Weights(path, revision, precision, offload), question, quantize)
