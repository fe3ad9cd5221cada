"""The state of a labelling server: which pairs each rater was given, and what they answered.

A pair is named to a rater by a token that only this folder can compute, so that nothing on the page tells which model
drew an image. The token of a rater and a pair never changes: a page that was open while the server restarted can still
send its answer, and an answer that is sent twice counts once.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffalign.commands.label.answers import CHOICES, Answer, AnswerLog, identify, now, rater_name
from diffalign.commands.label.comparison import Comparison
from diffalign.commands.label.order import Order
from diffalign.data.images import source_image
from diffalign.files import shorten
from diffalign.structures import ImageSource

SIDES, SOURCE = ("left", "right"), "source"
PICKS = (*SIDES, *CHOICES[2:])  # what a rater can answer
LONGEST = 86_400.0  # seconds of an answer
RESERVED = 900.0  # seconds for which a pair stays assigned to a rater who may have left
AHEAD = 2  # pairs that a page holds: the one that is shown, and the one whose images load meanwhile


class UnknownPair(ValueError):
    """A token that names no pair of this rater."""


@dataclass(frozen=True)
class Shown:
    """A pair as a rater sees it: its token, its prompt, and whether this edits a source image."""

    token: str
    prompt: str
    source: bool = False


class Sitting:
    """Hand out pairs and record answers, for several raters at once."""

    def __init__(
        self,
        pairs: Sequence[Comparison],
        log: AnswerLog,
        order: Order,
        *,
        secret: bytes,
        seed: int = 0,
        raters_per_pair: int | None = None,
        digest: Callable[[Comparison], tuple[str, str]],
    ) -> None:
        """Prepare a sitting.

        Args:
            pairs: The pairs.
            log: File of answers.
            order: Rule for the next pair.
            secret: Key of the tokens.
            seed: Decides which image is on the left.
            raters_per_pair: Show a pair to at most this many raters; None: to all.
            digest: Hashes the images of a pair. ValueError: one cannot be read.
        """
        self.pairs, self.log, self.order, self.digest = pairs, log, order, digest
        self.seed, self.raters_per_pair, self._secret = seed, raters_per_pair, secret
        self.broken: dict[int, str] = {}  # pairs that cannot be shown, and why
        self._index = {pair.key: number for number, pair in enumerate(pairs)}
        self._tokens: dict[str, dict[str, int]] = {}
        self._given: dict[str, dict[int, float]] = {}  # rater -> pair -> time at which it was handed out
        self._counts: dict[int, int] = {}
        self._lock = threading.RLock()
        for answer in log.answers():
            self._count(answer, 1)

    def upcoming(self, rater: str) -> list[Shown]:
        """Return the rater's next pairs, at most ``AHEAD``; empty when all are answered."""
        with self._lock:
            given = self._given.setdefault(identify(rater), {})
            for index in [index for index in given if self._is_answered(rater, index) or index in self.broken]:
                del given[index]
            while len(given) < AHEAD:
                found = self.order.next(identify(rater), lambda i: self._is_open(rater, i), self.log.answers)
                if found is None:
                    break
                given[found] = time.monotonic()
            return [self._shown(rater, index) for index in given]

    def progress(self, rater: str) -> tuple[int, int]:
        """Return how many pairs the rater has answered, and how many there are for this rater."""
        with self._lock:
            done = {self._index[answer.pair] for answer in self.log.of(rater) if answer.pair in self._index}
            done = {index for index in done if self._is_answered(rater, index)}
            if self.raters_per_pair is None:
                return len(done), len(self.pairs) - len(self.broken.keys() - done)
            left = sum(self._is_open(rater, i, waiting=True) for i in range(len(self.pairs)))
            return len(done), len(done) + left

    def answer(self, rater: str, token: str, pick: str, seconds: float) -> bool:
        """Record an answer; False if the rater had answered this pair before, which changes nothing.

        Args:
            rater: Name of the rater.
            token: Token of the pair.
            pick: One of ``PICKS``.
            seconds: Time that the pair was visible.

        Raises:
            UnknownPair: The token is not one of this rater.
            ValueError: Another value is out of range, or an image can no longer be read.
            OSError: The answer could not be written.
        """
        name = rater_name(rater)
        if pick not in PICKS or not 0 <= seconds <= LONGEST:
            raise ValueError(f"an answer is one of {', '.join(PICKS)} after 0 to {LONGEST:g} seconds")
        index = self.find(name, token)
        pair, left = self.pairs[index], self.left(name, index)
        content = self.digest(pair)
        choice = pick if pick not in SIDES else CHOICES[left if pick == "left" else 1 - left]
        made = Answer(name, pair.key, choice, left, round(seconds, 3), now(), pair.prompt.text, pair.models, content)

        with self._lock:
            if self._is_answered(name, index):
                return False
            self.log.add(made)
            self._count(made, 1)
            return True

    def undo(self, rater: str) -> Shown | None:
        """Take back the rater's last answer, and show its pair again; None without one."""
        with self._lock:
            answer = self.log.undo(rater)
            if answer is None:
                return None
            self._count(answer, -1)
            index = self._index.get(answer.pair)
            if index is None:
                return None
            given = self._given.setdefault(identify(rater), {})
            self._given[identify(rater)] = {index: time.monotonic(), **dict(list(given.items())[: AHEAD - 1])}
            return self._shown(rater, index)

    def find(self, rater: str, token: str) -> int:
        """Return the index of the pair that a token names to a rater. Raises UnknownPair."""
        with self._lock:
            tokens = self._tokens.get(identify(rater), {})
            if token not in tokens:  # of a page that was open before the server was restarted
                tokens = {self._token(rater, index): index for index in range(len(self.pairs))}
            if token not in tokens:
                raise UnknownPair(f"no pair {shorten(token, 40)!r} for this rater: reload the page")
            return tokens[token]

    def picture(self, token: str, side: str) -> tuple[int, ImageSource] | None:
        """Return the index of a pair, and the image that a token and a side, or "source", name; None: there is none."""
        with self._lock:
            for rater, tokens in self._tokens.items():
                if (index := tokens.get(token)) is None:
                    continue
                pair, left = self.pairs[index], self.left(rater, index)
                images = {"left": pair.images[left], "right": pair.images[1 - left], SOURCE: source_image(pair.prompt)}
                found = images.get(side)
                return None if found is None else (index, found)
        return None

    def left(self, rater: str, index: int) -> int:
        """Return which image of a pair is on the left for a rater: 0 or 1, half of the time each."""
        text = f"{self.seed}\0{identify(rater)}\0{self.pairs[index].key}"
        return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] & 1

    def drop(self, index: int, reason: str) -> None:
        """Show a pair to nobody any more, because an image of it cannot be read."""
        with self._lock:
            self.broken.setdefault(index, reason)

    def _shown(self, rater: str, index: int) -> Shown:
        prompt = self.pairs[index].prompt
        return Shown(self._token(rater, index), prompt.text, source_image(prompt) is not None)

    def _token(self, rater: str, index: int) -> str:
        name = f"{identify(rater)}\0{self.pairs[index].key}"
        token = hashlib.blake2b(name.encode(), key=self._secret, digest_size=15).hexdigest()
        self._tokens.setdefault(identify(rater), {})[token] = index
        return token

    def _is_answered(self, rater: str, index: int) -> bool:
        answer = self.log.get(rater, self.pairs[index].key)
        return answer is not None and answer.prompt == self.pairs[index].prompt.text

    def _is_open(self, rater: str, index: int, waiting: bool = False) -> bool:
        """Return whether a rater may still get a pair; waiting: also if it was handed out to this rater."""
        mine = index in self._given.get(identify(rater), {})
        if (mine and not waiting) or index in self.broken or self._is_answered(rater, index):
            return False
        return mine or self.raters_per_pair is None or self._taken(rater, index) < self.raters_per_pair

    def _taken(self, rater: str, index: int) -> int:
        """Count the raters who answered a pair, or have it on their page."""
        recent = time.monotonic() - RESERVED
        held = sum(
            given.get(index, -math.inf) > recent for other, given in self._given.items() if other != identify(rater)
        )
        return self._counts.get(index, 0) + held

    def _count(self, answer: Answer, step: int) -> None:
        index = self._index.get(answer.pair)
        if index is not None and answer.choice != "skip":
            self._counts[index] = self._counts.get(index, 0) + step
