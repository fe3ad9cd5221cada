"""Where examples come from: data, streams of data, or the model's own images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data.epoch_order import take
from diffalign.data.pairs import Samples, load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.data.rollouts import Pairing, pick_pairs
from diffalign.data.stream import Cursor, PairStream, stream_pairs
from diffalign.data.unpaired import LabelledData, load_labelled
from diffalign.losses.registry import PreferenceLoss, get_loss
from diffalign.rng import KeyedRNG
from diffalign.runtime.loop import Metrics
from diffalign.runtime.provenance import digest
from diffalign.structures import Prompt
from diffalign.trainers.collector import Collector, Rollout
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.latents import Examples, LatentEncoder, Loaded

Data = Samples | PairStream | Sequence[Prompt]
DIGESTED = 16


class Source(Protocol):
    """Where examples come from."""

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """This process's share of an iteration, and what to log of it."""


def read_data(args: DiffusionDPOConfig, given: Data | None) -> Data | None:
    """What was passed, or what ``args`` names; None for a stream, which opens once processes know of each other.

    ValueError: nothing to train on, pairs where single images are wanted or the other way round, or no image that is
    liked where a loss learns from no other.
    """
    data = _named_data(args) if given is None and not (args.streaming and args.train_data) else given
    liked_only = get_loss(args.loss).liked_only or args.losers == "reference"
    singles = liked_only or not get_loss(args.loss).paired
    if isinstance(data, Samples | PairStream) and isinstance(data, LabelledData) != singles:
        what = f"loss {args.loss!r}" if args.losers == "data" else "losers: reference"
        wanted = "single images: pass what load_labelled gave" if singles else "pairs: pass what load_pairs gave"
        raise ValueError(f"{what} wants {wanted}")
    return data.liked() if liked_only and isinstance(data, LabelledData) else data


def _named_data(args: DiffusionDPOConfig) -> Data:
    if args.online:
        if not (args.train_prompts and args.rewards):
            raise ValueError("pairs of the model's own images need train_prompts and rewards: one is missing")
        return load_prompts(args.train_prompts)
    if not args.train_data:
        raise ValueError("train_data is missing: write train_data: [pairs.parquet], or train_prompts and rewards")
    paired = get_loss(args.loss).paired and args.losers == "data"
    return (load_pairs if paired else load_labelled)(*args.train_data, settings=args.data)


def open_stream(args: DiffusionDPOConfig, noise: KeyedRNG, accelerator: Accelerator) -> PairStream:
    """This process's share of the files that ``args`` names."""

    def permutation(n: int, *address: int) -> Tensor:
        return noise.permutation(n, "stream", *address)

    rank, world = accelerator.process_index, accelerator.num_processes
    return stream_pairs(*args.train_data, settings=args.data, permutation=permutation, rank=rank, world=world)


def sampled_digest(data: Samples) -> str:
    """Of the number of samples, and of a few of them: enough to notice other data, and quick for millions."""
    count = len(data)
    chosen = min(count, DIGESTED)
    few = [data[number * count // chosen] for number in range(chosen)]
    return digest([str(count), *(text for sample in few for text in (sample.key, sample.prompt.text))])


class DataSource:
    """Examples of a data set: ``num_pairs`` per optimizer step, in a new order each epoch."""

    def __init__(self, data: Samples, framer: LatentEncoder) -> None:
        self.data, self.framer = data, framer

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """The samples of one optimizer step."""
        count, noise = len(self.data), self.framer.noise
        places = take(
            count,
            self.framer.args.num_pairs,
            iteration,
            lambda epoch: noise.permutation(count, "data", epoch),
        )
        own = [places[number] for number in self.framer.share]
        return self.framer([partial(self.data.load, place) for place in own], iteration, own), {}


class StreamSource:
    """Examples of a stream. ``cursors``: where the next iteration begins on each process, for the trainer to keep."""

    def __init__(self, data: PairStream, framer: LatentEncoder, accelerator: Accelerator) -> None:
        self.data, self.framer, self.accelerator = data, framer, accelerator
        self.resume([Cursor().state()] * accelerator.num_processes)

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """The next pairs."""
        # Each is read when the one before has become latents: thousands of pictures would not fit in memory.
        examples = self.framer([self._next] * len(self.framer.share), iteration)
        # The main process writes the checkpoint, and cannot know how many pairs the others had to leave out.
        here = torch.tensor([list(self._here.state().values())], device=self.accelerator.device)
        everyone = self.accelerator.gather(here).tolist()
        self.cursors = [dict(zip(Cursor().state(), numbers, strict=True)) for numbers in everyone]
        return examples, {}

    def _next(self) -> Loaded:
        pair, images, self._here = next(self._pairs)
        return pair, images

    def resume(self, cursors: Sequence[Mapping[str, int]]) -> None:
        """Goes on at another place. ValueError: the places of another number of processes."""
        if len(cursors) != self.accelerator.num_processes:
            raise ValueError(
                f"a stream that {len(cursors)} process(es) read cannot go on in {self.accelerator.num_processes}: "
                "its files were dealt otherwise; resume with as many processes, or set streaming: false"
            )
        self.cursors = list(cursors)
        self._pairs = self.data.load(Cursor(**cursors[self.accelerator.process_index]))


class RolloutSource:
    """Examples of the model's own images, scored: pairs within each prompt's group, or their images one by one."""

    def __init__(self, collector: Collector, pairing: Pairing, loss: PreferenceLoss, accelerator: Accelerator) -> None:
        self.collector, self.pairing, self.loss, self.accelerator = collector, pairing, loss, accelerator

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """Those of this process's groups."""
        rollout = self.collector(iteration)
        examples, pairs = self.examples(rollout)
        return examples, {**rollout.metrics, "pairs": float(pairs)}

    def examples(self, rollout: Rollout) -> tuple[Examples, int]:
        """Those of a rollout, and how many pairs all processes found.

        Processes find more pairs or fewer. Each gets as many examples as the others, some again with weight 0, so that
        all make the same passes; and weights such that the mean over processes is that over the pairs of all of them.
        """
        self.rollout = rollout
        buffer, weights = rollout.buffer, self.pairing.rewards or self.collector.weights
        leaves = buffer.leaves
        groups = buffer.group[leaves].tolist()
        scores = sum(weight * buffer.rewards[name][leaves] for name, weight in weights.items()).tolist()
        pairs = pick_pairs(groups, scores, self.pairing)
        rows, labels = self._examples(pairs or [(0, 0)], scores)
        weight, everyone = self._weight(len(rows) if pairs else 0, len(pairs))
        chosen = [place % len(rows) for place in range(len(weight))]
        rows, labels = [rows[place] for place in chosen], [labels[place] for place in chosen]
        # A sample's place among all of the iteration's tells it from the others; so does a pair of places.
        first = groups[0] * self.collector.args.group_size
        total = self.collector.args.num_groups * self.collector.args.group_size
        numbers = [sum((first + place) * total**k for k, place in enumerate(row)) for row in rows]
        examples = Examples(
            torch.stack([buffer.x[leaves[list(row)]] for row in rows]),
            torch.tensor(labels),
            [buffer.prompts[groups[row[0]]].text for row in rows],
            numbers,
            weight,
        )
        return examples, everyone

    def _weight(self, own: int, pairs: int) -> tuple[Tensor, int]:
        """That of each example, as many as the process with the most has, at least one; and the pairs of all.

        own, pairs: how many examples and pairs this process has.
        """
        here = torch.tensor([[own, pairs]], device=self.accelerator.device)
        counts, everyone = self.accelerator.gather(here).T
        most, total = max(int(counts.max()), 1), max(int(counts.sum()), 1)
        return (torch.arange(most) < own) * (most * len(counts) / total), int(everyone.sum())

    def _examples(
        self, pairs: Sequence[tuple[int, int]], scores: Sequence[float]
    ) -> tuple[list[tuple[int, ...]], list[float]]:
        """The places of each example's images, and its label."""
        if self.loss.paired:
            return list(pairs), [self.pairing.label(scores[better] - scores[worse]) for better, worse in pairs]
        liked: dict[int, bool] = {}
        for better, worse in pairs:
            liked[better] = True  # as in data on disk, an image that won once is liked, however often it lost
            liked.setdefault(worse, False)
        chosen = {place: well for place, well in liked.items() if well or not self.loss.liked_only}
        return [(place,) for place in chosen], [float(well) for well in chosen.values()]
