"""Soft-TIFA of GenEval 2 (arXiv 2512.16853): how likely a vision-language model gives the expected answers.

Questions come with the prompt: metadata ``vqa_list``, pairs of question and answer, as in ``geneval2_data.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.files import shorten
from diffalign.rewards.base import Extras, Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import at_least_float32, on_images, should_quantize
from diffalign.rewards.support.qwen_vl import answer_logits, load_with_own_limits
from diffalign.rewards.support.weights import Weights, load_once

QUESTION = "{} Answer in one word."
YES = ("Yes", "yes", " yes", " Yes")
DIGITS = {
    word: str(i)
    for i, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1)
}
MEANS = ("arithmetic", "geometric")


def spellings(question: str, answer: str) -> tuple[str, ...]:
    """List the accepted beginnings of an answer: of a number if the question begins with "How many", else of yes."""
    if not question.startswith("How many"):
        return YES
    number = DIGITS.get(answer, "other")
    return (answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", number, f" {number}")


def read_questions(prompt: str, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read ``vqa_list`` from a prompt's metadata. Raises ValueError if it is missing or of another form."""
    found = metadata.get("vqa_list")
    pairs = found if isinstance(found, (list, tuple)) else []
    if not pairs or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        for pair in pairs
    ):
        raise ValueError(
            f"metadata of {shorten(prompt, 80)!r}: vqa_list is {shorten(repr(found), 80)}; write pairs such as "
            '[["How many dogs are in the image?", "two"], ["Are the dogs brown?", "Yes"]]'
        )
    return [(question, answer) for question, answer in pairs]


def log_probability(logits: Tensor, tokenizer: Any, question: str, answer: str) -> Tensor:
    """Compute the log of the summed probability of first tokens of an answer, from logits (vocabulary)."""
    first = sorted({tokenizer.encode(text)[0] for text in spellings(question, answer)})
    return at_least_float32(logits).log_softmax(-1)[first].logsumexp(-1)


@dataclass(frozen=True)
class SoftTifa:
    """Mean probability of the expected answers to the questions in a prompt's metadata, in [0, 1].

    Extras: "am" and "gm", the arithmetic mean (of atoms) and the geometric one (of the whole prompt). A first token
    that two spellings share counts once; the published code counts it twice, but no two do in Qwen's vocabulary.

    Args:
        name: under which scores are stored.
        weights: of a Qwen vision-language model.
        mean: "arithmetic" or "geometric".
        batch_size: questions per call of the network.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    mean: str = "arithmetic"
    batch_size: int = 16
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the mean and the batch size."""
        if self.mean not in MEANS:
            raise ValueError(f"reward {self.name!r}: mean must be one of {', '.join(MEANS)}, got {self.mean!r}")
        if self.batch_size < 1:
            raise ValueError(f"reward {self.name!r}: batch_size is {self.batch_size}; write 1 or more")

    @on_images("am", "gm")
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        atoms = self.atoms(images, prompts, metadata)
        am = torch.stack([logs.exp().mean() for logs in atoms])
        gm = torch.stack([logs.mean().exp() for logs in atoms])
        return am if self.mean == "arithmetic" else gm, {"am": am.detach(), "gm": gm.detach()}

    def atoms(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> list[Tensor]:
        """Compute log-probabilities of the expected answers, a tensor per image, in the order of its questions."""
        asked = [read_questions(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        loaded = load_once(load_with_own_limits, self.weights)
        quantize = should_quantize(self.quantize, images)
        flat = [(i, *pair) for i, pairs in enumerate(asked) for pair in pairs]
        found: list[Tensor] = []
        for start in range(0, len(flat), self.batch_size):
            part = flat[start : start + self.batch_size]
            first = part[0][0]
            own = images[first : part[-1][0] + 1]
            texts = [QUESTION.format(question) for _, question, _ in part]
            rows = [i - first for i, *_ in part]
            logits = answer_logits(loaded, self.weights, own, texts, quantize=quantize, rows=rows)[:, -1]
            found += [log_probability(one, loaded[1], *pair) for one, (_, *pair) in zip(logits, part, strict=True)]
        return list(torch.stack(found).split([len(pairs) for pairs in asked]))


FACTS = RewardCard(
    "answers to questions about the prompt", 0.05, "arXiv 2512.16853", "Qwen/Qwen3-VL-8B-Instruct", "Apache-2.0", 8770
)


@register("soft_tifa", FACTS, mean="arithmetic")
@register("soft_tifa_gm", FACTS, mean="geometric")
def soft_tifa(
    name: str,
    mean: str,
    path: str = FACTS.weights,
    batch_size: int = 16,
    revision: str | None = None,
    precision: str = "bf16",
    offload: bool = False,
    quantize: bool | None = None,
) -> SoftTifa:
    """Build the published judge, or one on another Qwen model at ``path``."""
    return SoftTifa(name, Weights(path, revision, precision, offload), mean, batch_size, quantize)
