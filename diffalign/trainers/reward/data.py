"""Preference pairs of a judge: read, with the names of their raters, and split by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from diffalign.data.pairs import PairData, load_pairs, named
from diffalign.files import printable, some
from diffalign.log import get_logger
from diffalign.runtime.provenance import digest
from diffalign.structures import Pair
from diffalign.trainers.reward.config import RewardTrainerConfig

logger = get_logger(__name__)
FEWEST = 2  # prompts that can be split


@dataclass(frozen=True)
class Example:
    """What is known of a pair before its images are read.

    Attributes:
        source: Index of the data set that holds it.
        index: Index in the data set.
        text: The prompt.
        label: Probability that the first image is preferred.
        rater: Name of the rater; empty if the data name none.
    """

    source: int
    index: int
    text: str
    label: float
    rater: str


@dataclass(frozen=True)
class JudgeData:
    """Pairs to train on, and pairs of other prompts to judge the judge by.

    Attributes:
        sources: Data sets that read the images.
        examples: All pairs.
        train: Positions in ``examples`` of the pairs to train on.
        held_out: Positions of the held-out pairs.
        raters: Names of the raters of ``train``, sorted; empty if one judge is trained for all.
    """

    sources: Sequence[PairData]
    examples: Sequence[Example]
    train: Sequence[int]
    held_out: Sequence[int]
    raters: Sequence[str] = field(default_factory=tuple)

    def pair(self, position: int) -> Pair:
        """Return a pair whose images are not read yet."""
        example = self.examples[position]
        return self.sources[example.source][example.index]

    def load(self, position: int) -> tuple[int, tuple[Any, ...]]:
        """Read the images of a pair, or of the next usable one of its data set and part; return its position too."""
        source = self.examples[position].source
        order: dict[int, int] = {}  # index in the data set -> position

        def candidates() -> Iterator[int]:
            part = self.held_out if position in self._apart else self.train
            for i in chain([position], (i for i in part if i > position), (i for i in part if i < position)):
                if self.examples[i].source == source:
                    order[self.examples[i].index] = i
                    yield self.examples[i].index

        index, _, images = self.sources[source].load_first(candidates())
        return order[index], images

    def rater(self, position: int) -> int:
        """Return the row of a pair's rater; -1 if it is none of ``raters``."""
        return self._rows.get(self.examples[position].rater, -1)

    @cached_property
    def _apart(self) -> frozenset[int]:
        return frozenset(self.held_out)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.raters)}

    @property
    def digest(self) -> str:
        """Digest of texts, labels and raters, and of the split."""
        rows = (f"{e.source} {e.index} {e.label} {e.rater} {e.text}" for e in self.examples)
        return digest([*rows, str([*self.train]), str([*self.held_out])])


def read_judge_data(config: RewardTrainerConfig, given: Any = None) -> JudgeData:
    """Read and split the data of a configuration.

    Args:
        config: Where they are, and how to split them.
        given: Pairs in memory, as ``load_pairs`` takes or returns them, instead of ``train_data``.

    Raises:
        ValueError: No data, nothing but ties, prompts that cannot be split, or no raters where there should be several.
    """
    if given is None and not config.train_data:
        raise ValueError("train_data is missing: write train_data: [preferences.parquet], or pass train_dataset=")
    name = named(config.train_data if given is None else [given])
    data = _opened(config, config.train_data if given is None else (given,))
    sources = [data, _opened(config, config.eval_data)] if config.eval_data else [data]
    examples = [example for number, source in enumerate(sources) for example in _examples(number, source, config)]

    if config.eval_data:
        train, held_out = _without_shared(examples)
    else:
        train, held_out = split_by_prompt(examples, config.held_out_share, config.seed)
    _check(examples, train, held_out, name, config)
    raters = sorted({examples[i].rater for i in train} - {""}) if config.prototypes > 1 else []
    if config.prototypes > 1 and len(raters) < 2:
        raise ValueError(
            f"prototypes {config.prototypes} tell raters apart, and {name} names {len(raters)} in column "
            f"{config.rater_column!r}: set rater_column, or prototypes: 1"
        )
    return JudgeData(sources, examples, train, held_out, raters)


def _opened(config: RewardTrainerConfig, sources: Sequence[Any]) -> PairData:
    if len(sources) == 1 and isinstance(sources[0], PairData):
        return sources[0]
    return load_pairs(*sources, settings=config.data)


def _examples(number: int, source: PairData, config: RewardTrainerConfig) -> list[Example]:
    found = []
    for index in range(len(source)):
        pair, cells = source[index], source.row(index).values
        value = cells.get(config.rater_column)
        rater = "" if value is None or callable(value) or value != value else printable(str(value).strip())[:100]
        found.append(Example(number, index, pair.prompt.text, float(pair.label), rater))
    return found


def split_by_prompt(examples: Sequence[Example], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split pairs into (train, held out) by prompt: a prompt's pairs stay together, whatever case it is written in.

    Which prompts are held out depends on the seed and on the prompts alone.
    """
    keys = {_key(example.text) for example in examples}
    ranked = sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest())
    count = min(max(1, round(share * len(ranked))), len(ranked) - 1) if len(ranked) > 1 else 0
    apart = set(ranked[:count])
    held_out = [i for i, example in enumerate(examples) if _key(example.text) in apart]
    return [i for i, example in enumerate(examples) if _key(example.text) not in apart], held_out


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _without_shared(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Hold out the second source, and leave out of the first what has a prompt of it."""
    held_out = [i for i, example in enumerate(examples) if example.source == 1]
    apart = {_key(examples[i].text) for i in held_out}
    own = [i for i, example in enumerate(examples) if example.source == 0]
    train = [i for i in own if _key(examples[i].text) not in apart]
    if len(train) < len(own):
        logger.info(f"{len(own) - len(train)} pairs of train_data are left out: eval_data has their prompts")
    return train, held_out


def _check(
    examples: Sequence[Example], train: Sequence[int], held_out: Sequence[int], name: str, config: RewardTrainerConfig
) -> None:
    if not train or not held_out:
        prompts = len({_key(example.text) for example in examples})
        what = "all of its prompts are in eval_data" if config.eval_data else f"it has {prompts} prompt"
        raise ValueError(
            f"{name}: no pairs are left to {'hold out' if train else 'train on'}: {what}; label pairs of {FEWEST} "
            "prompts at least, or name others in eval_data"
        )
    for positions, which, key in ((train, name, "train_data"), (held_out, "the held-out part", "held_out_share")):
        if all(examples[i].label == 0.5 for i in positions):
            raise ValueError(
                f"{key}: all {len(positions)} labels of {which} are 0.5, ties, which say nothing of what is better: "
                f"label more pairs (of prompts such as {some(dict.fromkeys(examples[i].text for i in positions), 2)})"
            )
