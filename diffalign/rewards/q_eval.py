"""Q-Eval-Score (arXiv 2503.02357): Qwen2-VL-7B rates an image in five levels; alignment, and quality.

The published weights are those that the authors trained again on public data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.levels import expected_level
from diffalign.rewards.support.preprocess import on_images, should_quantize
from diffalign.rewards.support.prompts import fill, published_template
from diffalign.rewards.support.qwen_vl import answer_logits, load
from diffalign.rewards.support.weights import Weights, load_once

LEVELS = {"Excellent": 1.0, "Good": 0.75, "Fair": 0.5, "Poor": 0.25, "Bad": 0.0}


@dataclass(frozen=True)
class QEvalScore:
    """Expected level under the likelihood of the answer's first token, among the five levels: [0, 1].

    Args:
        name: under which scores are stored.
        weights: of the model.
        template: published question, with ``{prompt}``.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    template: str
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        loaded = load_once(load, self.weights)
        questions = [fill(self.template, prompt) for prompt in prompts]
        quantize = should_quantize(self.quantize, images)
        logits = answer_logits(loaded, self.weights, images, questions, quantize=quantize)[:, -1]
        return expected_level(logits, [loaded[1].encode(level)[0] for level in LEVELS], list(LEVELS.values()))


WEIGHTS = "AGI-Eval-Official/Q-Eval-Score"
ALIGNMENT = RewardCard("whether the image shows the text", 0.05, "arXiv 2503.02357", WEIGHTS, "not stated", 8290)
QUALITY = RewardCard("looks", 0.05, "arXiv 2503.02357", WEIGHTS, "not stated", 8290)


@register("q_eval_alignment", ALIGNMENT, template="q_eval_alignment")
@register("q_eval_quality", QUALITY, template="q_eval_quality")
def q_eval(
    name: str,
    template: str,
    path: str = WEIGHTS,
    revision: str | None = None,
    precision: str = "fp16",
    offload: bool = False,
    quantize: bool | None = None,
) -> QEvalScore:
    """Build the published model of one task, or that of a folder ``path``. template: of the folder ``templates``."""
    return QEvalScore(name, Weights(path, revision, precision, offload), published_template(template), quantize)
