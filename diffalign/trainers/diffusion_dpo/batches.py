"""Sources of preference examples: data sets, streams, or the model's own images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.epoch_order import take
from diffalign.data.pairs import Samples, load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.data.rollouts import pick_pairs
from diffalign.data.stream import Cursor, PairStream, stream_pairs
from diffalign.data.unpaired import LabelledData, load_labelled
from diffalign.losses.registry import PreferenceLoss, get_loss
from diffalign.rollout.advantages import weighted_total
from diffalign.rollout.collector import Collector, Rollout
from diffalign.runtime.interfaces import IterationBatch
from diffalign.runtime.provenance import digest
from diffalign.runtime.run import Run
from diffalign.structures import Pair, Prompt, text_of
from diffalign.trainers.aspect_buckets import make_buckets
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.latents import Examples, LatentEncoder, Loaded
from diffalign.trainers.diffusion_dpo.step_pairs import StepExamples
from diffalign.trainers.inputs import dataset

Data = Samples | PairStream | Sequence[Prompt]
DIGESTED = 16


@dataclass
class PreferenceBatch(IterationBatch):
    """The examples of an iteration.

    Attributes:
        examples: This process's examples; None until the images of a rollout are ranked.
        rollout: The rollout, or the paths with children, that an online run ranks.
    """

    examples: Examples | StepExamples | None = None
    rollout: IterationBatch | None = None

    @property
    def ranked(self) -> Examples | StepExamples:
        """The examples, once they exist."""
        assert self.examples is not None
        return self.examples

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rollout of an online run; nothing for data sets, which are read again."""
        return {} if self.rollout is None else self.rollout.state_dict()

    def ids(self, rows: Tensor) -> list[dict[str, Any]]:
        """Return number and prompt of examples."""
        return [{"number": self.ranked.number[i], "prompt": text_of(self.ranked.texts[i])} for i in rows.tolist()]


class Source(ABC):
    """Source of examples. An iteration is ``sample``, ``score`` and ``rank``."""

    @abstractmethod
    def sample(self, iteration: int) -> PreferenceBatch:
        """Read the examples of an iteration, or sample the images that will become examples."""

    def score(self, batch: PreferenceBatch) -> None:
        """Score sampled images."""

    def rank(self, batch: PreferenceBatch) -> None:
        """Turn scores into examples."""

    def restored(self, iteration: int, tensors: Mapping[str, Tensor]) -> PreferenceBatch:
        """Rebuild a batch from its ``state_dict``."""
        raise NotImplementedError("data sets are read again")

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


def read_data(config: DiffusionDPOConfig, given: Data | None) -> Data | None:
    """Return the data that were passed, or those of the configuration.

    Returns:
        Pairs, labelled images or prompts; None for a stream, which each process opens for itself.

    Raises:
        ValueError: Nothing to train on, pairs where single images are needed or the other way round, or no liked image
            where a loss learns from no other.
    """
    data = (
        _named_data(config)
        if given is None and not (config.streaming and config.train_data)
        else _passed(config, given)
    )
    liked_only = get_loss(config.loss).liked_only or config.losers == "reference"
    singles = liked_only or not get_loss(config.loss).paired
    if isinstance(data, Samples | PairStream) and isinstance(data, LabelledData) != singles:
        what = f"loss {config.loss!r}" if config.losers == "data" else "losers: reference"
        needed = "single images: pass what load_labelled gave" if singles else "pairs: pass what load_pairs gave"
        raise ValueError(f"{what} wants {needed}")
    return data.liked() if liked_only and isinstance(data, LabelledData) else data


def _passed(config: DiffusionDPOConfig, given: Any) -> Data | None:
    """Convert data in memory: prompts for online training, else a ``datasets.Dataset`` of pairs or labelled images."""
    if given is None or isinstance(given, Samples | PairStream):
        return given
    if config.online:
        return dataset(given, None, "train_prompts")
    return _load(config)(given, settings=config.data)


def _load(config: DiffusionDPOConfig) -> Callable[..., Samples]:
    """Return the function that loads what the loss needs: pairs, or single images."""
    return load_pairs if get_loss(config.loss).paired and config.losers == "data" else load_labelled


def _named_data(config: DiffusionDPOConfig) -> Data:
    if config.online:
        if not (config.train_prompts and config.rewards):
            raise ValueError("pairs of the model's own images need train_prompts and rewards: one is missing")
        return load_prompts(config.train_prompts)
    if not config.train_data:
        raise ValueError("train_data is missing: write train_data: [pairs.parquet], or train_prompts and rewards")
    return _load(config)(*config.train_data, settings=config.data)


def open_stream(run: Run[DiffusionDPOConfig]) -> PairStream:
    """Open this process's share of the files that the configuration names."""
    config = run.config

    def permutation(n: int, *address: int) -> Tensor:
        return run.rng.permutation(n, "stream", *address)

    return stream_pairs(
        *config.train_data, settings=config.data, permutation=permutation, rank=run.rank, world=run.world
    )


def sampled_digest(data: Samples) -> str:
    """Digest the number of samples and a few of them: enough to notice other data, and quick for millions."""
    count = len(data)
    chosen = min(count, DIGESTED)
    few = [data[number * count // chosen] for number in range(chosen)]
    return digest([str(count), *(text for sample in few for text in (sample.key, sample.prompt.text))])


class DataSource(Source):
    """Examples of a data set: ``num_pairs`` per optimizer step, in a new order each epoch.

    Attributes:
        buckets: Samples by size; None if all are cropped to the resolution.
    """

    def __init__(self, run: Run[DiffusionDPOConfig], data: Samples, encoder: LatentEncoder) -> None:
        self.run, self.data, self.encoder = run, data, encoder
        step, count = run.config.aspect_buckets, run.config.num_pairs
        self.buckets = make_buckets(run, data, range(len(data)), step, count, "data") if step else None

    def sample(self, iteration: int) -> PreferenceBatch:
        """Read the samples of one optimizer step."""
        size, indices = self._indices(iteration)
        own = [indices[number] for number in self.encoder.share]
        return PreferenceBatch(self.encoder([partial(self.data.load, index) for index in own], iteration, own, size))

    def _indices(self, iteration: int) -> tuple[tuple[int, int] | None, list[int]]:
        """Return the size of an optimizer step's samples, if it is not the model's, and their indices."""
        if self.buckets is not None:
            return self.buckets.take(iteration)
        count, rng = len(self.data), self.run.rng
        return None, take(
            count, self.run.config.num_pairs, iteration, lambda epoch: rng.permutation(count, "data", epoch)
        )


class StreamSource(Source):
    """Examples of a stream.

    Attributes:
        cursors: Position of each process at the start of the next iteration.
    """

    def __init__(self, run: Run[DiffusionDPOConfig], data: PairStream, encoder: LatentEncoder) -> None:
        self.run, self.data, self.encoder = run, data, encoder
        self._here = Cursor()
        self._pairs: Iterator[tuple[Pair, tuple[Image.Image, ...], Cursor]] = iter(())
        self.load_state_dict({"cursors": [Cursor().state()] * run.world})

    def sample(self, iteration: int) -> PreferenceBatch:
        """Read the next pairs."""
        # One by one, each after the previous one was encoded: thousands of images would not fit in memory.
        examples = self.encoder([self._next] * len(self.encoder.share), iteration)
        # The main process writes the checkpoint, and cannot know how many pairs the others had to leave out.
        here = self.run.gather(torch.tensor([list(self._here.state().values())]))
        self.cursors = [dict(zip(Cursor().state(), numbers, strict=True)) for numbers in here.tolist()]
        return PreferenceBatch(examples)

    def _next(self) -> Loaded:
        pair, images, self._here = next(self._pairs)
        return pair, images

    def state_dict(self) -> dict[str, Any]:
        """Return the position of each process."""
        return {"cursors": self.cursors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at stored positions. Raises ValueError for those of another number of processes."""
        cursors = state["cursors"]
        if len(cursors) != self.run.world:
            raise ValueError(
                f"a stream that {len(cursors)} process(es) read cannot go on in {self.run.world}: its files were dealt "
                "otherwise; resume with as many processes, or set streaming: false"
            )
        self.cursors = list(cursors)
        self._pairs = self.data.load(Cursor(**cursors[self.run.rank]))


class RolloutSource(Source):
    """Examples of the model's own images: pairs within each prompt's group, or single images with labels."""

    def __init__(self, run: Run[DiffusionDPOConfig], collector: Collector, loss: PreferenceLoss) -> None:
        self.run, self.collector, self.loss, self.pairing = run, collector, loss, run.config.data.rollouts
        self.weights = self.pairing.rewards or collector.weights

    def sample(self, iteration: int) -> PreferenceBatch:
        """Sample the images of this process's groups."""
        return PreferenceBatch(rollout=self.collector.sample(iteration))

    def score(self, batch: PreferenceBatch) -> None:
        """Score the images."""
        self.collector.score(_rollout(batch))

    def rank(self, batch: PreferenceBatch) -> None:
        """Pair the images by their scores."""
        rollout = _rollout(batch)
        self.collector.advantage(rollout)
        batch.examples, pairs = self.examples(rollout)
        batch.metrics = {**rollout.metrics, "pairs": float(pairs)}

    def restored(self, iteration: int, tensors: Mapping[str, Tensor]) -> PreferenceBatch:
        """Rebuild the rollout and its examples."""
        rollout = self.collector.restored(iteration, tensors, {})
        return PreferenceBatch(self.examples(rollout)[0], rollout)

    def pairs(self, rollout: Rollout) -> tuple[list[tuple[int, int]], list[float]]:
        """Return pairs of leaves, the better first, and the score of each leaf."""
        leaves = rollout.buffer.leaves
        rewards = {name: values[leaves] for name, values in rollout.buffer.rewards.items()}
        scores = weighted_total(rewards, self.weights).tolist()
        return pick_pairs(rollout.buffer.group[leaves].tolist(), scores, self.pairing), scores

    def examples(self, rollout: Rollout) -> tuple[Examples | StepExamples, int]:
        """Return the examples of a rollout, and how many pairs all processes found.

        Processes find more pairs or fewer. Each gets as many examples as the others, some again with weight 0, so that
        all make the same passes; the weights make the mean over processes that over the pairs of all of them.
        """
        buffer = rollout.buffer
        leaves = buffer.leaves
        groups = buffer.group[leaves].tolist()
        pairs, scores = self.pairs(rollout)
        rows, labels = self._examples(pairs or [(0, 0)], scores)
        weight, everyone = padded_weights(self.run, len(rows) if pairs else 0, len(pairs))

        chosen = [index % len(rows) for index in range(len(weight))]
        rows, labels = [rows[index] for index in chosen], [labels[index] for index in chosen]
        # A number identifies an example among all of the iteration: the indices of its images, as digits.
        first = groups[0] * self.run.config.group_size
        total = self.run.config.num_groups * self.run.config.group_size
        numbers = [sum((first + index) * total**k for k, index in enumerate(row)) for row in rows]
        examples = Examples(
            torch.stack([buffer.x[leaves[list(row)]] for row in rows]),
            torch.tensor(labels),
            [buffer.prompts[groups[row[0]]].input for row in rows],
            numbers,
            weight,
        )
        return examples, everyone

    def _examples(
        self, pairs: Sequence[tuple[int, int]], scores: Sequence[float]
    ) -> tuple[list[tuple[int, ...]], list[float]]:
        """Return the image indices of each example, and its label."""
        if self.loss.paired:
            return list(pairs), [self.pairing.label(scores[better] - scores[worse]) for better, worse in pairs]
        liked: dict[int, bool] = {}
        for better, worse in pairs:
            liked[better] = True  # as in data on disk, an image that won once is liked, however often it lost
            liked.setdefault(worse, False)
        chosen = {index: won for index, won in liked.items() if won or not self.loss.liked_only}
        return [(index,) for index in chosen], [float(won) for won in chosen.values()]


def padded_weights(run: Run[DiffusionDPOConfig], own: int, pairs: int) -> tuple[Tensor, int]:
    """Return the weights of examples, (n,), and the number of pairs of all processes.

    n is the largest number of examples of any process, at least 1. Weights from index ``own`` on, of repeated examples,
    are 0; the mean of weighted losses over processes is their mean over all examples.

    Args:
        run: The training.
        own: Number of examples of this process.
        pairs: Number of pairs of this process.
    """
    counts, everyone = run.gather(torch.tensor([[own, pairs]])).T
    most, total = max(int(counts.max()), 1), max(int(counts.sum()), 1)
    return (torch.arange(most) < own) * (most * len(counts) / total), int(everyone.sum())


def _rollout(batch: PreferenceBatch) -> Rollout:
    assert isinstance(batch.rollout, Rollout)
    return batch.rollout
