"""Training data of the embedded reward models: images, their prompts, and the specifications that they fulfil.

Half of the images are the pipeline's, at several guidance scales, so that many are wrong; the renderer's are right.
``judges.py`` is the command.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.models import load_model
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.shapes import TAGS, caption, render, scene_for
from diffalign.shapes.captions import OPENINGS, Spec, is_held_out, is_novel, neighbours, phrase, specs
from diffalign.shapes.verifier import Found, find_objects, judge, nearest_colors
from diffalign.structures import Guidance, Prompt
from scripts import ROOT

PIPELINE = ROOT / "assets/shapes-sd3"
EVERY: list[Spec] = [spec for tag in TAGS for spec in specs(tag)]
PLACE = {json.dumps(spec): i for i, spec in enumerate(EVERY)}
GUIDANCE = (1.0, 2.0, 3.0)  # of the pipeline's images, in turn: from often wrong to mostly right
BATCH = 256


def drawn(model, prompts: list[Prompt], seed: int) -> Iterator[Tensor]:
    """Sample images of the pipeline, (b, 3, 64, 64) in [0, 1], in eight steps, cycling through guidance scales."""
    levels = model.levels(8)
    for number, begin in enumerate(range(0, len(prompts), BATCH)):
        part = prompts[begin : begin + BATCH]
        own = torch.arange(len(part))
        scale = GUIDANCE[number % len(GUIDANCE)]
        guidance = Guidance(scale, model.encode([""]) if scale != 1 else None)
        addresses = NoiseKeys(KeyedRNG(seed), "judges", number, own, torch.zeros_like(own))
        route = SamplingPlan(ode_plan(8), levels, guidance)
        conditioning = model.encode([p.text for p in part])
        yield torch.cat([i for _, i in generate(model, route, conditioning, own, addresses, BATCH)])


def holds(objects: tuple[Found, ...]) -> list[int]:
    """List the indices in ``EVERY`` of the specifications that an image fulfils strictly."""
    count = len(objects)
    return [
        i
        for i, spec in enumerate(EVERY)
        if sum(item["count"] for item in spec["include"]) == count and judge(objects, spec).strict
    ]


def make_data(args: argparse.Namespace) -> None:
    """Images as 8 bits, what each was drawn for, and what it shows, for each side of the split that is not made yet."""
    model = load_model(PIPELINE, max_sequence_length=16)
    for side, held_out, count in (("train", False, args.images), ("held_out", True, args.images // 8)):
        if (args.work_dir / f"{side}.json").is_file():  # the last file of a side
            continue
        rng = random.Random(f"{args.seed} {side}")
        prompts = [caption(rng, held_out=held_out) for _ in range(count)]
        images = [round8(part) for part in tqdm(drawn(model, prompts, args.seed + held_out), desc=side)]
        if not held_out:  # what the renderer draws is always right, and of every caption as often
            extra = [caption(rng) for _ in range(count // 2)]
            images.append(round8(render([scene_for(p.metadata, rng) for p in extra])))
            prompts += extra
        pixels = torch.cat(images).contiguous()
        shown = [
            holds(find_objects(plane))
            for part in tqdm(pixels.split(512), desc="verify")
            for plane in nearest_colors(part.float() / 255)
        ]
        asked = [PLACE[json.dumps(p.metadata)] for p in prompts]
        save_file({"pixels": pixels, "asked": torch.tensor(asked)}, args.work_dir / f"{side}.safetensors")
        texts = [p.text for p in prompts]
        (args.work_dir / f"{side}.json").write_text(json.dumps({"shown": shown, "texts": texts}))
        right = sum(a in s for a, s in zip(asked, shown, strict=True)) / len(asked)
        print(f"{side}: {len(pixels)} images, {right:.3f} show what they were drawn for")


def round8(images: Tensor) -> Tensor:
    """Round to 8 bits."""
    return (images.clamp(0, 1) * 255).round().byte()


@dataclass(frozen=True)
class Data:
    """pixels: (N, 3, 64, 64) uint8. asked: (N,), the specification that each was drawn for. truth: (N, specs), bool."""

    pixels: Tensor
    asked: Tensor
    truth: Tensor
    texts: list[str]

    @classmethod
    def read(cls, args: argparse.Namespace, side: str) -> Data:
        """Read the data that ``make_data`` wrote."""
        tensors = load_file(args.work_dir / f"{side}.safetensors")
        content = json.loads((args.work_dir / f"{side}.json").read_text())
        truth = torch.zeros(len(content["shown"]), len(EVERY), dtype=torch.bool)
        for i, shown in enumerate(content["shown"]):
            truth[i, shown] = True
        return cls(tensors["pixels"], tensors["asked"], truth, content["texts"])


def wording(place: int, rng: random.Random, every: bool = False) -> str:
    """Word a specification as a caption of the training side, or of ``every`` one."""
    while True:
        opening = "" if rng.random() < 0.3 else rng.choice(OPENINGS[1:])
        if every or not is_held_out(EVERY[place], opening):
            return opening + phrase(EVERY[place])


TRAINABLE = [i for i, spec in enumerate(EVERY) if not is_novel(spec)]


class Sampler:
    """Draw training samples: tasks equally often, and in half of the cases captions that differ in one word.

    places: the specifications that captions may have.
    """

    def __init__(self, data: Data, rng: random.Random, places: Sequence[int] = TRAINABLE) -> None:
        self.data, self.rng, self.places = data, rng, places
        self.ease = 0.0  # the share of captions of single objects, among those of all tasks
        self.hardness = 0.5  # how often the second image is one that the pipeline got wrong, where there is one

    @cached_property
    def shows(self) -> list[list[int]]:
        """List the images that show each specification."""
        return [column.nonzero()[:, 0].tolist() for column in self.data.truth.T]

    @cached_property
    def failed(self) -> list[list[int]]:
        """List the images that were sampled for each specification and do not show it."""
        data = self.data
        wrong = ~data.truth[torch.arange(len(data.asked)), data.asked]
        return [((data.asked == place) & wrong).nonzero()[:, 0].tolist() for place in range(len(EVERY))]

    @cached_property
    def near(self) -> list[list[int]]:
        """List the specifications that differ from each in one word."""
        return [[PLACE[json.dumps(other)] for other in neighbours(spec)] for spec in EVERY]

    @cached_property
    def of_tag(self) -> dict[str, list[int]]:
        """List the specifications of each task that some image shows."""
        return {tag: [i for i in self.places if EVERY[i]["tag"] == tag and self.shows[i]] for tag in TAGS}

    def preference(self) -> tuple[int, int, int, int]:
        """Draw (caption, image that shows it, image that does not, caption of the task that the first does not show).

        The second image was drawn for the caption, or shows the other one.
        """
        rng, truth = self.rng, self.data.truth
        while True:
            own = self.of_tag[TAGS[0] if rng.random() < self.ease else rng.choice(TAGS)]
            place = rng.choice(own)
            first = rng.choice(self.shows[place])
            near = [i for i in self.near[place] if self.shows[i]]
            wrong = rng.choice(near if near and rng.random() < 0.5 else own)
            if truth[first, wrong]:
                continue
            if self.failed[place] and rng.random() < self.hardness:
                return place, first, rng.choice(self.failed[place]), wrong
            second = rng.choice(self.shows[wrong])
            if not truth[second, place]:
                return place, first, second, wrong
