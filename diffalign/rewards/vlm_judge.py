"""Judges that speak: a vision-language model behind any OpenAI-compatible endpoint.

Three ways to ask: a number, a checklist of yes/no questions, and which of two images is better, asked in both orders so
that a taste for the first place cancels. Where the server gives log-probabilities, an answer is the expected one under
them instead of the single word that was drawn.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from diffalign.files import shorten
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.http_client import HTTPClient, RemoteError, encode_image
from diffalign.rewards.support.preprocess import check_images, on_images
from diffalign.rewards.support.prompts import check_template

RATE = (
    'Rate from {low} to {high} how well this image shows "{prompt}", and how good it looks. '
    'Answer with JSON alone: {{"score": number}}.'
)
CHECK = "{question} Answer with one word, yes or no."
SHOWS = 'Does this image show "{prompt}"?'
WORD_TOKENS = 4  # of an answer of one word
LEAST_MASS = 0.5  # of both words, below which the first token says nothing about the answer
COMPARE = 'Which of these two images shows "{prompt}" better? Answer with one digit, 1 or 2.'


@dataclass(frozen=True)
class Endpoint:
    """A model behind ``POST /v1/chat/completions``.

    max_tokens: of an answer. logprobs: ask for them where the answer is one word of two.
    """

    client: HTTPClient
    model: str
    max_tokens: int = 64
    logprobs: bool = True

    def ask(self, text: str, images: Sequence[str], one_word: bool = False) -> Answer:
        """One question about images (PNG, base64). RemoteError where the reply is not of the protocol's form."""
        pictures = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
            "max_tokens": WORD_TOKENS if one_word else self.max_tokens,
            "temperature": 0,
            **({"logprobs": True, "top_logprobs": 20} if one_word and self.logprobs else {}),
        }
        reply = self.client.post("/v1/chat/completions", body)
        try:
            choice = reply["choices"][0]
            words = choice["message"]["content"]
            first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
            table = {str(entry["token"]): float(entry["logprob"]) for entry in first}
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise RemoteError(f"{self.client.url} answered {str(reply)[:200]!r}, no chat completion") from error
        if not isinstance(words, str):
            raise RemoteError(f"{self.client.url} answered {words!r} where text belongs")
        return Answer(words, table)


@dataclass(frozen=True)
class Answer:
    """text: what the model said. first: log-probabilities of its first token, as far as the server gave them."""

    text: str
    first: Mapping[str, float]

    def choice(self, one: str, other: str) -> float:
        """The probability of ``one`` against ``other`` where the first token is likely one of them.

        Else, a model that thinks before it answers or gives no log-probabilities, 1 or 0 by the text. RemoteError: the
        text has neither, or both.
        """
        mass = dict.fromkeys((one, other), 0.0)
        for token, log_prob in self.first.items():
            if (word := token.strip().strip(".\"'").lower()) in mass:
                mass[word] += math.exp(log_prob)
        if (total := sum(mass.values())) >= LEAST_MASS:
            return mass[one] / total
        said = mass.keys() & re.findall(r"[a-z0-9]+", self.text.lower())
        if len(said) == 1:
            return float(one in said)
        raise RemoteError(f"the judge said {self.text[:100]!r}, neither {one!r} nor {other!r}")

    def number(self, low: float, high: float) -> float:
        """``score`` of the JSON object in the text. RemoteError: none, or out of bounds."""
        for part in re.findall(r"\{[^{}]*\}", self.text):
            try:
                value = json.loads(part)["score"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
                return float(value)
        raise RemoteError(f'the judge said {self.text[:100]!r}, not {{"score": number}} from {low:g} to {high:g}')


def _scores(name: str, client: HTTPClient, ask: Any, items: Sequence[Any]) -> list[float]:
    """NaN where asking failed, with one warning per cause."""
    found = client.map(ask, items)
    for error in {client.clean(str(result)) for result in found if isinstance(result, RemoteError)}:
        warnings.warn(f"reward {name!r}: {error}", stacklevel=3)
    return [math.nan if isinstance(result, RemoteError) else result for result in found]


@dataclass(frozen=True)
class RatingJudge:
    """A number from ``low`` to ``high``. question: with {prompt}, {low} and {high}."""

    name: str
    endpoint: Endpoint
    question: str = RATE
    low: float = 0.0
    high: float = 10.0
    differentiable: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """As asked for."""
        return (self.low, self.high)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""

        def ask(i: int) -> float:
            text = self.question.format(prompt=prompts[i], low=f"{self.low:g}", high=f"{self.high:g}")
            return self.endpoint.ask(text, [encode_image(images[i])]).number(self.low, self.high)

        return torch.tensor(_scores(self.name, self.endpoint.client, ask, range(len(images))), dtype=torch.float32)


def _questions(metadata: Mapping[str, Any]) -> list[str]:
    found = metadata.get("questions") or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(question, str) for question in found):
        raise ValueError(f"metadata: questions is {shorten(repr(found), 80)}; write a list of texts")
    return list(found)


@dataclass(frozen=True)
class ChecklistJudge:
    """The mean probability of "yes" over the questions in a prompt's metadata, under ``questions``.

    Without any, the one question is whether the image shows the prompt. In [0, 1]. An image of which one question
    fails has no score.
    """

    name: str
    endpoint: Endpoint
    differentiable: bool = False
    range: tuple[float, float] = (0.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""
        asked = [
            (i, question)
            for i, prompt in enumerate(prompts)
            for question in _questions(metadata[i]) or [SHOWS.format(prompt=prompt)]
        ]
        pictures = [encode_image(image) for image in images]

        def ask(item: tuple[int, str]) -> float:
            text = CHECK.format(question=item[1])
            return self.endpoint.ask(text, [pictures[item[0]]], one_word=True).choice("yes", "no")

        answers = torch.tensor(_scores(self.name, self.endpoint.client, ask, asked), dtype=torch.float32)
        owner = torch.tensor([i for i, _ in asked], dtype=torch.int64)
        total = torch.zeros(len(images)).index_add(0, owner, answers)
        return total / torch.bincount(owner, minlength=len(images))


@dataclass(frozen=True)
class PairwiseJudge:
    """How often an image is preferred to the others of its group: the mean over them, in [0, 1]. A group reward.

    Each pair is asked in both orders, and a pair of which one fails does not count. ``most_pairs`` per group, the
    nearest neighbours in its order first, bounds the cost: a group of n has n (n - 1) / 2.
    """

    name: str
    endpoint: Endpoint
    question: str = COMPARE
    most_pairs: int = 28
    differentiable: bool = False
    needs_groups: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]; groups (B,): (B,) float32 on the CPU, NaN without a single answer.

        An image that is not finite is in no pair.
        """
        check_images(images)
        finite = images.isfinite().flatten(1).all(1).cpu()
        members = [((groups.cpu() == label) & finite).nonzero()[:, 0] for label in groups.unique().tolist()]
        pairs = [pair for group in members for pair in self._pairs(group)]
        pictures = [encode_image(image) if good else "" for image, good in zip(images, finite, strict=True)]

        def ask(pair: tuple[int, int]) -> float:
            text = self.question.format(prompt=prompts[pair[0]])
            return self.endpoint.ask(text, [pictures[i] for i in pair], one_word=True).choice("1", "2")

        both = [order for first, second in pairs for order in ((first, second), (second, first))]
        won = torch.tensor(_scores(self.name, self.endpoint.client, ask, both), dtype=torch.float32).view(-1, 2)
        # The first image's share of its pair: asked first it should be "1", asked second it should be "2".
        share = (won[:, 0] + 1 - won[:, 1]) / 2
        total, count = torch.zeros(len(images)), torch.zeros(len(images))
        for (first, second), value in zip(pairs, share.tolist(), strict=True):
            if not math.isnan(value):
                total[first] += value
                total[second] += 1 - value
                count[first] += 1
                count[second] += 1
        return total / count

    def _pairs(self, members: Tensor) -> list[tuple[int, int]]:
        every = sorted(combinations(range(len(members)), 2), key=lambda pair: (pair[1] - pair[0], pair))
        return [(int(members[a]), int(members[b])) for a, b in every[: self.most_pairs]]


OPTIONS = ("question", "low", "high", "most_pairs")


@register("vlm_rating", RewardCard("what a judge is asked for, as a number", 0.5), judge=RatingJudge)
@register("vlm_checklist", RewardCard("share of questions answered with yes", 0.05), judge=ChecklistJudge)
@register("vlm_pairwise", RewardCard("share of its group that an image is preferred to", 0.05), judge=PairwiseJudge)
def vlm_judge(
    name: str,
    judge: Callable[..., Any],
    url: str,
    model: str,
    token_env: str | None = None,
    timeout: float = 60.0,
    retries: int = 4,
    concurrency: int = 8,
    max_tokens: int = 64,
    logprobs: bool = True,
    **options: Any,
) -> Any:
    """A judge behind the OpenAI-compatible server at ``url`` (see ``HTTPClient.for_url``); options are its fields."""
    client = HTTPClient.for_url(url, token_env, timeout=timeout, retries=retries, concurrency=concurrency)
    known = [field.name for field in fields(judge) if field.name in OPTIONS]
    if unknown := options.keys() - set(known):
        wrong, right = ", ".join(sorted(unknown)), ", ".join(known) or "none"
        raise ValueError(f"reward {name!r} takes no {wrong}; it takes {right}")
    if "question" in options:
        blanks = {"prompt", "low", "high"} if judge is RatingJudge else {"prompt"}
        check_template(name, str(options["question"]), blanks)
    return judge(name, Endpoint(client, model, max_tokens, logprobs), **options)
