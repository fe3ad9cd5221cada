"""What a preference loss learns from, as latents: pairs or single images, of data or of the model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.framing import DRAWS, Framing, SizeConditioning, frame
from diffalign.data.order import take
from diffalign.data.pairs import Samples
from diffalign.data.rollouts import Pairing, pick_pairs
from diffalign.data.stream import Cursor, PairStream
from diffalign.losses.registry import PreferenceLoss
from diffalign.rollout.encoding import EncodedPrompts
from diffalign.runtime.loop import Metrics
from diffalign.runtime.noise import Noise
from diffalign.structures import LabelledImage, Pair
from diffalign.trainers.diffusion_dpo_config import DiffusionDPOConfig
from diffalign.trainers.rollouts import Collector, Rollout


@dataclass(frozen=True)
class Examples:
    """P examples of K images: pairs, the preferred image first, or single images.

    latents: (P, K, C, h, w). label: (P,), the probability that the first image is the preferred one; of single images
    1 for liked, 0 for disliked. texts: P prompts. sizes: per example and image, where the images are framed data.
    number: per example, what tells it from the others of its optimizer step, on all processes. weight: (P,), 1, or 0
    for an example that only keeps a process company.
    """

    latents: Tensor
    label: Tensor
    texts: list[str]
    number: list[int]
    weight: Tensor
    sizes: list[tuple[SizeConditioning, ...]] | None = None


Loaded = tuple[Pair | LabelledImage, tuple[Image.Image, ...]]


class Source(Protocol):
    """Where examples come from."""

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """This process's share of an iteration, and what to log of it."""


class Framer:
    """Samples with their images as examples: framed as drawn, encoded, and latents kept by what they are made of.

    share: the numbers of this process's samples among the ``num_pairs`` of an optimizer step.
    """

    def __init__(self, encoded: EncodedPrompts, args: DiffusionDPOConfig, noise: Noise, share: range) -> None:
        self.model, self.cache, self.identity = encoded.model, encoded.cache, encoded.identity
        self.args, self.noise, self.share = args, noise, share
        height, width = self.model.default_resolution
        assert height == width
        self.resolution = height

    def __call__(self, loaded: Sequence[Loaded], iteration: int) -> Examples:
        """Examples of this process's samples, in their order."""
        rows = [self._example(*sample, iteration, n) for n, sample in zip(self.share, loaded, strict=True)]
        latents, sizes, labels = zip(*rows, strict=True)
        texts = [sample.prompt.text for sample, _ in loaded]
        label = torch.tensor(labels)
        return Examples(torch.stack(latents), label, texts, list(self.share), torch.ones_like(label), list(sizes))

    def _example(
        self, sample: Pair | LabelledImage, images: Sequence[Image.Image], iteration: int, number: int
    ) -> tuple[Tensor, tuple[SizeConditioning, ...], float]:
        """Latents (K, C, h, w), what SDXL is told of each image, and the label."""
        drawn = self.noise.generator("framing", iteration, number).integers(0, DRAWS, 3).tolist()
        # Drawn for the sample, so that both images of a pair are cropped and mirrored alike.
        framing = Framing.drawn(drawn, "random" if self.args.random_crop else "center", self.args.random_flip)
        if isinstance(sample, Pair):
            images, label = images if sample.label >= 0.5 else images[::-1], max(sample.label, 1 - sample.label)
        else:
            label = float(sample.liked)
        framed = [frame(image, self.resolution, framing) for image in images]
        return torch.stack([self._latent(pixels) for pixels, _ in framed]), tuple(told for _, told in framed), label

    @torch.no_grad()
    def _latent(self, pixels: Tensor) -> Tensor:
        key = f"latent {self.identity} {hashlib.blake2b(pixels.numpy().tobytes(), digest_size=20).hexdigest()}"
        if (kept := self.cache.get(key)) is not None:
            return kept["latent"]
        # Alone, because a batch's shape shows in the last bits, and what is kept must not depend on its neighbours.
        image = (pixels[None].float() / 255).to(self.model.device)
        latent = self.model.encode_images(image)[0].float().cpu()
        self.cache.put(key, {"latent": latent})
        return latent


class DataSource:
    """Examples of a data set: ``num_pairs`` per optimizer step, in a new order each epoch."""

    def __init__(self, data: Samples, framer: Framer) -> None:
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
        return self.framer([self.data.load(places[number]) for number in self.framer.share], iteration), {}


class StreamSource:
    """Examples of a stream. ``cursor``: where the next iteration begins, for the trainer to keep."""

    def __init__(self, data: PairStream, framer: Framer) -> None:
        self.data, self.framer = data, framer
        self.resume(Cursor())

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """The next pairs."""
        own = list(islice(self._pairs, len(self.framer.share)))
        self.cursor = own[-1][2]
        return self.framer([(pair, images) for pair, images, _ in own], iteration), {}

    def resume(self, cursor: Cursor) -> None:
        """Goes on at another place."""
        self.cursor, self._pairs = cursor, self.data.load(cursor)


class RolloutSource:
    """Examples of the model's own images, scored: pairs within each prompt's group, or their images one by one."""

    def __init__(self, collector: Collector, pairing: Pairing, loss: PreferenceLoss) -> None:
        self.collector, self.pairing, self.loss = collector, pairing, loss

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """Those of this process's groups."""
        rollout = self.collector(iteration)
        examples, pairs = self.examples(rollout)
        return examples, {**rollout.metrics, "pairs": float(pairs)}

    def examples(self, rollout: Rollout) -> tuple[Examples, int]:
        """Those of a rollout, and how many pairs. Where there are none, one of weight 0 keeps others company."""
        self.rollout = rollout
        buffer, weights = rollout.buffer, self.pairing.rewards or self.collector.weights
        leaves = buffer.leaves
        groups = buffer.group[leaves].tolist()
        scores = sum(weight * buffer.rewards[name][leaves] for name, weight in weights.items()).tolist()
        pairs = pick_pairs(groups, scores, self.pairing)
        rows, labels = self._examples(pairs or [(0, 0)], scores)
        # A sample's place among all of the iteration's tells it from the others; so does a pair of places.
        first = groups[0] * self.collector.args.group_size
        total = self.collector.args.num_groups * self.collector.args.group_size
        numbers = [sum((first + place) * total**k for k, place in enumerate(row)) for row in rows]
        examples = Examples(
            torch.stack([buffer.x[leaves[list(row)]] for row in rows]),
            torch.tensor(labels),
            [buffer.prompts[groups[row[0]]].text for row in rows],
            numbers,
            torch.full((len(rows),), float(bool(pairs))),
        )
        return examples, len(pairs)

    def _examples(
        self, pairs: Sequence[tuple[int, int]], scores: Sequence[float]
    ) -> tuple[list[tuple[int, ...]], list[float]]:
        """The places of each example's images, and its label."""
        if self.loss.paired:
            return list(pairs), [self.pairing.label(scores[better] - scores[worse]) for better, worse in pairs]
        sides = (0,) if self.loss.liked_only else (0, 1)
        return [(pair[side],) for pair in pairs for side in sides], [1.0 - side for _ in pairs for side in sides]
