"""VQAScore (arXiv 2404.01291) on Qwen's vision-language models, as in the authors' package since version 3.1.

The likelihood is the softmax over the raw logits of one forward pass. Departure from that package: it takes the softmax
of the scores that ``generate`` returns, to which generation settings such as a repetition penalty have been applied. As
in that package, the softmax covers all rows of the head, including the few hundred rows beyond the tokenizer's
vocabulary; training has made them unlikely. (CLIP-FlanT5's head is truncated to the vocabulary.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import at_least_float32, on_images, should_quantize
from diffalign.rewards.support.prompts import check_question
from diffalign.rewards.support.qwen_vl import answer_logits, load
from diffalign.rewards.support.weights import Weights, load_once
from diffalign.rewards.vqascore import ANSWERS, PAPER

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
KNOWN = ("yes", "yes_no")


@dataclass(frozen=True)
class QwenVqaScore:
    """Probability, in [0, 1], that the first token of the answer is "Yes".

    Args:
        name: under which scores are stored.
        weights: of the vision-language model.
        answer: "yes" normalizes over the vocabulary, "yes_no" over "Yes" and "No".
        question: with one ``{}`` for the prompt; version 3.0 of the authors' package used 'Does this image show "{}"?'.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    answer: str = "yes"
    question: str = QUESTION
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the answer and the question."""
        if self.answer not in KNOWN:
            raise ValueError(f"reward {self.name!r}: answer must be one of {', '.join(KNOWN)}, got {self.answer!r}")
        check_question(self.name, self.question)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        loaded = load_once(load, self.weights)
        tokenizer, quantize = loaded[1], should_quantize(self.quantize, images)
        questions = [self.question.format(prompt) for prompt in prompts]
        logits = answer_logits(loaded, self.weights, images, questions, quantize=quantize)
        yes, no = (torch.tensor(tokenizer.encode(word), device=images.device) for word in ("Yes", "No"))
        return ANSWERS[self.answer](at_least_float32(logits).log_softmax(-1), yes, no)


MEASURES = "whether the image shows the text"
QWEN25 = RewardCard(MEASURES, 0.05, PAPER, "Qwen/Qwen2.5-VL-7B-Instruct", "Apache-2.0", 8290)
QWEN3 = RewardCard(MEASURES, 0.05, PAPER, "Qwen/Qwen3-VL-8B-Instruct", "Apache-2.0", 8770)


@register("vqascore_qwen2.5", QWEN25, path=QWEN25.weights)
@register("vqascore_qwen3", QWEN3, path=QWEN3.weights)
def qwen_vqascore(
    name: str,
    path: str,
    answer: str = "yes",
    question: str = QUESTION,
    revision: str | None = None,
    precision: str = "bf16",
    offload: bool = False,
    quantize: bool | None = None,
) -> QwenVqaScore:
    """Build the published models, another size of them, or one of the same layout at ``path``."""
    return QwenVqaScore(name, Weights(path, revision, precision, offload), answer, question, quantize)
