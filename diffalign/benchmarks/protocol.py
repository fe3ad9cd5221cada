"""The parts of a benchmark: where its prompts come from, which judges are asked what, and a registry of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from diffalign.benchmarks.names import benchmark_modules, unknown_benchmark
from diffalign.data.prompts import load_prompts
from diffalign.structures import Prompt

Figures = dict[str, float]
Asks = Callable[[Prompt], Sequence[Prompt]]


def itself(prompt: Prompt) -> list[Prompt]:
    """Ask a judge about the prompt as it is."""
    return [prompt]


@dataclass(frozen=True)
class Judge:
    """A reward that scores texts against every image: the prompt, or questions about it.

    Attributes:
        reward: Registered reward, or ``module:Class`` of this package.
        options: Options of the reward.
        asks: Texts, with the metadata that the reward reads, for each prompt; may be none.
        published: The authors' judge, where it is another one; empty if it is the same.
    """

    reward: str
    options: Mapping[str, Any] = field(default_factory=dict)
    asks: Asks = itself
    published: str = ""


@dataclass(frozen=True)
class Judged:
    """The answers about one image.

    Attributes:
        prompt: The prompt of the image.
        index: Index of the prompt.
        sample: Index of the image among those of its prompt.
        answers: Judge -> a score per text that it was asked; NaN where it failed.
    """

    prompt: Prompt
    index: int
    sample: int
    answers: Mapping[str, Sequence[float]]

    def answer(self, judge: str) -> float:
        """Return the only answer of a judge; NaN if it was not asked."""
        return next(iter(self.answers.get(judge, ())), math.nan)


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is run.

    Attributes:
        title: Its name, as the authors write it.
        source: arXiv number or repository, with the commit that the protocol was read from.
        size: Number of prompts.
        images_per_prompt: Images of each prompt.
        judges: Name -> judge.
        prompts: File of the package, hub id or named set; None where the user names a file.
        where: Where the prompts come from, and their licence.
        comparable: How the figures relate to published ones.
        headline: The figure that papers print.
        read: Reads the prompts of a file, folder or hub id.
        needs: Metadata that every prompt must have.
        unread: Fields of the published table that are not measured here, and why.
        layout: Path of an image in the layout that the authors' own scripts read; may use {index}, {sample}, {number},
            {text} and the prompt's metadata.
        grid: (rows, columns) of the images of a prompt in one file of that layout; None for a file per image.
    """

    title: str
    source: str
    size: int
    images_per_prompt: int
    judges: Mapping[str, Judge]
    prompts: str | None
    where: str
    comparable: str
    headline: str
    read: Callable[[str], list[Prompt]] = load_prompts
    needs: tuple[str, ...] = ()
    unread: str = ""
    layout: str = "{index:05d}-{sample}.png"
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark: its name, protocol and aggregation."""

    name: str
    protocol: Protocol
    summarise: Callable[[Sequence[Judged]], Figures]

    def load(self, source: str | None) -> list[Prompt]:
        """Read the prompts.

        Args:
            source: The user's file, folder or hub id; None for the benchmark's own.

        Raises:
            ValueError: There is no own source, or a prompt lacks metadata that judges or aggregation read.
            FileNotFoundError: The file does not exist.
        """
        chosen = source or self.protocol.prompts
        if chosen is None:
            raise ValueError(f"{self.name} needs its prompts: {self.protocol.where}; then write --prompts PATH")
        prompts = self.protocol.read(chosen)
        for number, prompt in enumerate(prompts):
            if absent := [key for key in self.protocol.needs if key not in prompt.metadata]:
                raise ValueError(
                    f"{chosen}: prompt {number + 1} ({prompt.text[:60]!r}) has no {' and no '.join(absent)}, which "
                    f"{self.name} reads; {self.protocol.where}"
                )
        return prompts

    def with_judges(self, chosen: Mapping[str, Judge]) -> Benchmark:
        """Return the benchmark with other judges in some places."""
        return replace(self, protocol=replace(self.protocol, judges={**self.protocol.judges, **chosen}))


BENCHMARKS: dict[str, Benchmark] = {}
Summarise = Callable[[Sequence[Judged]], Figures]


def register_benchmark(name: str, protocol: Protocol) -> Callable[[Summarise], Summarise]:
    """Register an aggregation function under ``name``, with the protocol that it belongs to."""

    def add(function: Summarise) -> Summarise:
        BENCHMARKS[name] = Benchmark(name, protocol, function)
        return function

    return add


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark. Raises ValueError, with the closest name, for an unknown one."""
    if name not in benchmark_modules():
        raise ValueError(unknown_benchmark(name))
    import_module(benchmark_modules()[name])
    return BENCHMARKS[name]


def mean(values: Iterable[float]) -> float:
    """Average the numbers that are not NaN; NaN if there is none."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def median(values: Iterable[float]) -> float:
    """Return the median of the numbers that are not NaN; NaN if there is none."""
    found = sorted(value for value in values if not math.isnan(value))
    middle = len(found) // 2
    if not found:
        return math.nan
    return found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2


def by(judged: Sequence[Judged], key: str) -> dict[str, list[Judged]]:
    """Group images by a value in their prompt's metadata, in order of first appearance."""
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        groups.setdefault(str(one.prompt.metadata.get(key, "all")), []).append(one)
    return groups
