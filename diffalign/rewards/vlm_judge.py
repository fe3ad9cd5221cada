"""VLM-as-judge rewards over an OpenAI-compatible API: rating, checklist and pairwise comparison.

Pairs are compared in both orders, which cancels position bias. If the server returns log-probabilities, the score is
the expected answer under them instead of the sampled token.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffalign.files import shorten
from diffalign.rewards.base import Extras, Metadata, RewardCard, register
from diffalign.rewards.support.http_client import HTTPClient, RemoteError, data_url
from diffalign.rewards.support.preprocess import check_images, on_images
from diffalign.rewards.support.prompts import check_template, fill
from diffalign.rewards.support.sources import source_images

T = TypeVar("T")
R = TypeVar("R")
NUMBER = r"([-+]?\d*\.?\d+)"
RATE = (
    'Rate from {low} to {high} how well this image shows "{prompt}", and how good it looks. '
    'Answer with JSON alone: {{"score": number}}.'
)
RATE_EDIT = (
    'The second image is the first one after the edit "{prompt}". Rate from {low} to {high} how well the edit was '
    'made, and how little else changed. Answer with JSON alone: {{"score": number}}.'
)
CHECK = "{question} Answer with one word, yes or no."
SHOWS = 'Does this image show "{prompt}"?'
WORD_TOKENS = 4  # max_tokens of a one-word answer
MIN_MASS = 0.5  # total probability of both words, below which log-probabilities of the first token are ignored
COMPARE = 'Which of these two images shows "{prompt}" better? Answer with one digit, 1 or 2.'


@dataclass(frozen=True)
class Endpoint:
    """A model behind ``POST /v1/chat/completions``.

    Attributes:
        client: connection to the server.
        model: name of the model in requests.
        max_tokens: of a free-form answer.
        logprobs: request log-probabilities for one-word answers.
        jpeg: quality of JPEG files in requests; None for PNG.
    """

    client: HTTPClient
    model: str
    max_tokens: int = 64
    logprobs: bool = True
    jpeg: int | None = None

    def encode(self, image: Tensor) -> str:
        """Encode an image (3, H, W), float, [0, 1], as a data URL."""
        return data_url(image, self.jpeg)

    def ask(self, text: str, images: Sequence[str], one_word: bool = False) -> Answer:
        """Ask a question about images (data URLs). Raises RemoteError if the response has another form."""
        content = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
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
    """Answer of a judge.

    Attributes:
        text: generated text.
        first: log-probabilities of the first token's candidates; empty if the server returned none.
    """

    text: str
    first: Mapping[str, float]

    def choice(self, one: str, other: str) -> float:
        """Return the probability of ``one`` against ``other``.

        Uses the log-probabilities if the first token is likely one of the two. Otherwise (the model reasons first, or
        there are no log-probabilities) it is 1 or 0 by the text. Raises RemoteError if the text has neither or both.
        """
        mass = dict.fromkeys((one, other), 0.0)
        for token, log_prob in self.first.items():
            if (word := token.strip().strip(".\"'").lower()) in mass:
                mass[word] += math.exp(log_prob)
        if (total := sum(mass.values())) >= MIN_MASS:
            return mass[one] / total
        words = mass.keys() & re.findall(r"[a-z0-9]+", self.text.lower())
        if len(words) == 1:
            return float(one in words)
        raise RemoteError(f"the judge said {self.text[:100]!r}, neither {one!r} nor {other!r}")

    def number(self, low: float, high: float) -> float:
        """Parse ``score`` from a JSON object in the text. Raises RemoteError if it is missing or out of bounds."""
        for part in re.findall(r"\{[^{}]*\}", self.text):
            try:
                value = json.loads(part)["score"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
                return float(value)
        raise RemoteError(f'the judge said {self.text[:100]!r}, not {{"score": number}} from {low:g} to {high:g}')

    @property
    def verdict(self) -> str:
        """The text in the last <answer> tags; all of it if there are none."""
        return (re.findall(r"<answer>(.*?)</answer>", self.text, re.DOTALL | re.IGNORECASE) or [self.text])[-1]

    def axis(self, name: str, low: float, high: float) -> float:
        """Parse "NAME score: number" from the verdict. Raises RemoteError if it is missing or out of bounds."""
        words = r"\s*".join(map(re.escape, name.split()))
        found = re.search(rf"{words}\s*score\s*(?:\([^)]*\))?\s*:\s*{NUMBER}", self.verdict, re.IGNORECASE)
        if found and low <= float(found[1]) <= high:
            return float(found[1])
        raise RemoteError(
            f'the judge said {self.text[:200]!r}, without "{name} score: number" from {low:g} to {high:g}'
        )


def query_all(name: str, client: HTTPClient, query: Callable[[T], R], items: Sequence[T], failed: R) -> list[R]:
    """Run ``query`` on every item. A failed query gives ``failed``, with one warning per cause."""
    results = client.map(query, items)
    for error in {client.clean(str(result)) for result in results if isinstance(result, RemoteError)}:
        warnings.warn(f"reward {name!r}: {error}", stacklevel=3)
    return [failed if isinstance(result, RemoteError) else result for result in results]


def yes_shares(
    name: str, endpoint: Endpoint, images: Tensor, asked: Sequence[tuple[int, str]], hard: bool = False
) -> Tensor:
    """Ask questions about images: the probability of "yes" of each pair (row, question), NaN where the query fails.

    hard: use the text of the answer alone.
    """
    encoded = [endpoint.encode(image) for image in images]

    def query(item: tuple[int, str]) -> float:
        answer = endpoint.ask(item[1], [encoded[item[0]]], one_word=True)
        return (replace(answer, first={}) if hard else answer).choice("yes", "no")

    return torch.tensor(query_all(name, endpoint.client, query, asked, math.nan), dtype=torch.float32)


@dataclass(frozen=True)
class RatingJudge:
    """Rate each image with a number from ``low`` to ``high``; ``question`` may use {prompt}, {low} and {high}.

    With ``source`` the judge sees the source image of the edit first, then the result.
    """

    name: str
    endpoint: Endpoint
    question: str = RATE
    low: float = 0.0
    high: float = 10.0
    source: bool = False
    differentiable: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Bounds that the question states."""
        return (self.low, self.high)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""

        sources = source_images(metadata, (images.shape[-2], images.shape[-1])) if self.source else None

        def query(i: int) -> float:
            text = self.question.format(prompt=prompts[i], low=f"{self.low:g}", high=f"{self.high:g}")
            seen = [images[i]] if sources is None else [sources[i], images[i]]
            return self.endpoint.ask(text, list(map(self.endpoint.encode, seen))).number(self.low, self.high)

        found = query_all(self.name, self.endpoint.client, query, range(len(images)), math.nan)
        return torch.tensor(found, dtype=torch.float32)


def _questions(metadata: Mapping[str, Any]) -> list[str]:
    found = metadata.get("questions") or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(question, str) for question in found):
        raise ValueError(f"metadata: questions is {shorten(repr(found), 80)}; write a list of texts")
    return list(found)


@dataclass(frozen=True)
class ChecklistJudge:
    """Average the probability of "yes", [0, 1], over the ``questions`` in a prompt's metadata.

    Without questions, the only one is whether the image shows the prompt. If a question fails, the image scores NaN.
    """

    name: str
    endpoint: Endpoint
    differentiable: bool = False
    range: tuple[float, float] = (0.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""
        queries = [
            (i, CHECK.format(question=question))
            for i, prompt in enumerate(prompts)
            for question in _questions(metadata[i]) or [SHOWS.format(prompt=prompt)]
        ]
        answers = yes_shares(self.name, self.endpoint, images, queries)
        owner = torch.tensor([i for i, _ in queries], dtype=torch.int64)
        total = torch.zeros(len(images)).index_add(0, owner, answers)
        return total / torch.bincount(owner, minlength=len(images))


@dataclass(frozen=True)
class PairwiseJudge:
    """Score an image by its mean preference over the other images of its group, in [0, 1]. A group reward.

    Each pair is compared in both orders; a pair is dropped if one of the two queries fails. ``most_pairs`` limits the
    cost per group, which has n (n - 1) / 2 pairs; pairs of images close together in the group come first.
    """

    name: str
    endpoint: Endpoint
    question: str = COMPARE
    most_pairs: int = 28
    differentiable: bool = False
    needs_groups: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1], in groups (B,): (B,) float32 on the CPU, NaN without an answer.

        Images that are not finite are excluded from all pairs.
        """
        check_images(images)
        finite = images.isfinite().flatten(1).all(1).cpu()
        indices = [((groups.cpu() == label) & finite).nonzero()[:, 0] for label in groups.unique().tolist()]
        pairs = [pair for group in indices for pair in self._pairs(group)]
        encoded = [self.endpoint.encode(image) if good else "" for image, good in zip(images, finite, strict=True)]
        query = lambda pair: self.preference(prompts[pair[0]], [encoded[i] for i in pair])  # noqa: E731

        orders = [order for first, second in pairs for order in ((first, second), (second, first))]
        found = query_all(self.name, self.endpoint.client, query, orders, math.nan)
        won = torch.tensor(found, dtype=torch.float32).view(-1, 2)
        # Preference for the pair's first image: P("1") in the first order, 1 - P("1") in the second.
        share = (won[:, 0] + 1 - won[:, 1]) / 2

        total, count = torch.zeros(len(images)), torch.zeros(len(images))
        for (first, second), value in zip(pairs, share.tolist(), strict=True):
            if not math.isnan(value):
                total[first] += value
                total[second] += 1 - value
                count[first] += 1
                count[second] += 1
        return total / count

    def preference(self, prompt: str, images: Sequence[str]) -> float:
        """Return the preference for the first of two images, in [0, 1]. Raises RemoteError without an answer."""
        text = self.question.format(prompt=prompt)
        return self.endpoint.ask(text, images, one_word=True).choice("1", "2")

    def _pairs(self, indices: Tensor) -> list[tuple[int, int]]:
        pairs = sorted(combinations(range(len(indices)), 2), key=lambda pair: (pair[1] - pair[0], pair))
        return [(int(indices[a]), int(indices[b])) for a, b in pairs[: self.most_pairs]]


@dataclass(frozen=True)
class AxesJudge:
    """Rate each image on named axes in one answer, which states "NAME score: number"; the score is a weighted mean.

    Args:
        name: under which scores are stored.
        endpoint: of the model.
        template: question, with ``{prompt}``.
        weights: of the axes by the words that the answer names them with; 0 for an axis that is only an extra.
        low: least number of an axis.
        high: greatest one.
        differentiable: False.
    """

    name: str
    endpoint: Endpoint
    template: str
    weights: Mapping[str, float]
    low: float = 0.0
    high: float = 1.0
    differentiable: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Bounds of the axes."""
        return (self.low, self.high)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU. The extras are the axes."""
        names = [axis.replace(" ", "_") for axis in self.weights]
        return on_images(*names)(self._score)(images, prompts, metadata)

    def _score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        def query(i: int) -> list[float]:
            answer = self.endpoint.ask(fill(self.template, prompts[i]), [self.endpoint.encode(images[i])])
            return [answer.axis(axis, self.low, self.high) for axis in self.weights]

        failed = [math.nan] * len(self.weights)
        found = torch.tensor(query_all(self.name, self.endpoint.client, query, range(len(images)), failed))
        axes, shares = found.double(), torch.tensor(list(self.weights.values()), dtype=torch.float64)
        table = {axis.replace(" ", "_"): values for axis, values in zip(self.weights, found.T, strict=True)}
        return (axes @ shares / shares.sum()).float(), table


OPTIONS = ("question", "low", "high", "source", "most_pairs")


@register("vlm_rating", RewardCard("what a judge is asked for, as a number", 0.5), judge=RatingJudge)
@register("vlm_checklist", RewardCard("share of questions answered with yes", 0.05), judge=ChecklistJudge)
@register("vlm_pairwise", RewardCard("share of its group that an image is preferred to", 0.05), judge=PairwiseJudge)
def vlm_judge(
    name: str,
    judge: type[RatingJudge | ChecklistJudge | PairwiseJudge],
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
    """Build a judge on an OpenAI-compatible server (see ``HTTPClient.for_url``); ``options`` are its fields."""
    endpoint = connect(url, model, token_env, timeout, retries, concurrency, max_tokens, logprobs)
    known = [field.name for field in fields(judge) if field.name in OPTIONS]
    if unknown := options.keys() - set(known):
        wrong, right = ", ".join(sorted(unknown)), ", ".join(known) or "none"
        raise ValueError(f"reward {name!r} takes no {wrong}; it takes {right}")
    if "question" in options:
        blanks = {"prompt", "low", "high"} if judge is RatingJudge else {"prompt"}
        check_template(name, str(options["question"]), blanks)
    if options.get("source") and "question" not in options:
        options["question"] = RATE_EDIT
    return judge(name, endpoint, **options)


def connect(
    url: str,
    model: str,
    token_env: str | None,
    timeout: float,
    retries: int,
    concurrency: int,
    max_tokens: int,
    logprobs: bool = False,
    jpeg: int | None = None,
) -> Endpoint:
    """Build the endpoint of a model on an OpenAI-compatible server."""
    client = HTTPClient.for_url(url, token_env, timeout=timeout, retries=retries, concurrency=concurrency)
    return Endpoint(client, model, max_tokens, logprobs, jpeg)
