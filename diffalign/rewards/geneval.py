"""GenEval (arXiv 2310.11513) on real images: objects by a detector, colours by CLIP, six kinds of checks.

A re-implementation on models of transformers. Departures from the published code: 1. the detector is the same
architecture in transformers' weights and preprocessing, not mmdet's; 2. colours are told by transformers' CLIP; 3. a
class that the detector does not know is refused, where the published code takes it for one that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, AutoTokenizer, CLIPModel

from diffalign.files import shorten
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.clip import image_embeddings, load_clip, text_embeddings
from diffalign.rewards.geneval_spec import read_spec
from diffalign.rewards.support.preprocess import centre_round, on_images, to_bytes
from diffalign.rewards.support.weights import Weights, check_report, frozen, load_once, on_device, pinned, split

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = 0x99 / 255  # around an object whose colour is asked for
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # the least confidence in an object
MAX_OBJECTS = 16  # objects of a class
POSITION_MARGIN = 0.1  # of both objects' sizes, that their centres must be apart
# What GenEval calls the classes that detectors trained on COCO call otherwise; some keep the names of Pascal VOC.
RENAMED = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True)
class Found:
    """An object: its box (left, top, right, bottom) in pixels, and its mask (H, W)."""

    box: tuple[float, float, float, float]
    mask: Tensor


Objects = Mapping[str, Sequence[Found]]
ColorsOf = Callable[[Sequence[Found], str], list[str]]


def relations(a: Found, b: Found) -> set[str]:
    """Where ``a`` lies from ``b``: of "left of", "right of", "above" and "below" one, two or none."""
    offset, apart = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        margin = POSITION_MARGIN * (a.box[high] - a.box[low] + b.box[high] - b.box[low])
        offset.append(distance)
        apart.append(max(abs(distance) - margin, 0) * (1 if distance > 0 else -1))
    if all(abs(part) < 1e-3 for part in apart):
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    found = set()
    for part, (before, after) in zip(apart, (("left of", "right of"), ("above", "below")), strict=True):
        if abs(part) / length > 0.5:
            found.add(before if part < 0 else after)
    return found


def correct(objects: Objects, colors_of: ColorsOf, spec: Mapping[str, Any]) -> float:
    """1 where every object asked for is there, in its colour and place, and nothing that is excluded; else 0."""
    right, groups = True, []
    for wanted in spec.get("include", []):
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        good = len(found) >= wanted["count"]
        if good and "color" in wanted:
            good = colors_of(found, wanted["class"]).count(wanted["color"]) >= wanted["count"]
        if good and "position" in wanted:
            good = _placed(found, groups, wanted["position"])
        groups.append(found if good else None)
        right &= good
    excluded = spec.get("exclude", [])
    return float(right and all(len(objects.get(other["class"], [])) < other["count"] for other in excluded))


def graded(objects: Objects, colors_of: ColorsOf, spec: Mapping[str, Any]) -> float:
    """Partial credit, as the reward server of Flow-GRPO (arXiv 2505.05470) gives it: the mean of its parts.

    A part for each number, 1 - |found - asked| / asked, below 0 where there are more than twice as many. Where the
    number is wrong, a 0 for colour and place together. Where it is right, a part for the colour, the share that has it,
    and if all have it one for the place: 1, and a 0 beside that 1 where some object is not there.
    """
    parts: list[float] = []
    groups: list[Sequence[Found] | None] = []
    for wanted in spec.get("include", []):
        found, count = objects.get(wanted["class"], []), wanted["count"]
        parts.append(1 - abs(len(found) - count) / count)
        good = len(found) == count
        if not good and ("color" in wanted or "position" in wanted):
            parts.append(0.0)
        if good and "color" in wanted:
            named = colors_of(found, wanted["class"]).count(wanted["color"])
            parts.append(named / count)
            good = named == count
        if good and "position" in wanted:
            good = _placed(found, groups, wanted["position"])
            parts += [] if good else [0.0]
            # Where there is something to be placed by, the published code adds this 1 whatever it found.
            parts += [] if groups[wanted["position"][1]] is None else [1.0]
        groups.append(found if good else None)
    return sum(parts) / len(parts)


def _placed(found: Sequence[Found], groups: Sequence[Sequence[Found] | None], position: tuple[str, int]) -> bool:
    relation, target = position
    return groups[target] is not None and all(relation in relations(a, b) for a in found for b in groups[target])


VERDICTS: dict[str, Callable[[Objects, ColorsOf, Mapping[str, Any]], float]] = {"correct": correct, "graded": graded}


def _load(weights: Weights, clip: str) -> tuple[Any, Any, CLIPModel, Any]:
    detector, report = AutoModelForUniversalSegmentation.from_pretrained(
        weights.path, revision=weights.revision, output_loading_info=True, trust_remote_code=False
    )
    # Detectors of older versions also hold buffers that are computed now; what they leave over is no fault.
    check_report({key: report[key] for key in ("missing_keys", "mismatched_keys")}, weights.path, "a detector")
    processor = AutoImageProcessor.from_pretrained(weights.path, revision=weights.revision, trust_remote_code=False)
    colors, tokenizer = load_clip(*split(clip)), AutoTokenizer.from_pretrained(**pinned(clip), trust_remote_code=False)
    return frozen(detector, weights), processor, frozen(colors, weights), tokenizer


def class_names(detector: Any) -> dict[int, str]:
    """What the detector knows, as GenEval calls it."""
    return {label: RENAMED.get(name, name) for label, name in detector.config.id2label.items()}


def detect(detector: Any, processor: Any, image: Tensor, threshold: float) -> dict[str, list[Found]]:
    """The objects of an image (3, H, W), float, [0, 1], by class, most confident first."""
    pixels = processor(to_bytes(image), return_tensors="pt").to(image.device, detector.dtype)
    (result,) = processor.post_process_instance_segmentation(
        detector(**pixels), threshold=threshold, target_sizes=[tuple(image.shape[-2:])], return_binary_maps=True
    )
    objects: dict[str, list[Found]] = {}
    segments = result["segments_info"]
    for place in sorted(range(len(segments)), key=lambda i: -segments[i]["score"]):
        mask = result["segmentation"][place].bool().cpu()
        same = objects.setdefault(class_names(detector)[segments[place]["label_id"]], [])
        if len(same) < MAX_OBJECTS:
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
            same.append(Found(box, mask))
    return objects


def colors_by_clip(model: CLIPModel, tokenizer: Any, image: Tensor, found: Sequence[Found], name: str) -> list[str]:
    """The colour of each object, cut out on grey, that CLIP finds most like it."""
    lines = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
    text = text_embeddings(model, tokenizer, lines).view(len(COLORS), len(TEMPLATES), -1).mean(1)
    names = []
    for thing in found:
        left, top, right, bottom = map(int, thing.box)
        cut = torch.where(thing.mask.to(image.device), image, BACKGROUND)[:, top:bottom, left:right]
        similarity = image_embeddings(model, cut[None], True, centre_round) @ F.normalize(text, dim=-1).T
        names.append(COLORS[int(similarity.argmax())])
    return names


@dataclass(frozen=True)
class GenEvalReward:
    """One verdict on what each prompt's metadata asks for, in GenEval's own format.

    weights: of the detector. clip: folder, or hub id with or without @revision, of the model that tells colours.
    verdict: a key of ``VERDICTS``.
    """

    name: str
    weights: Weights
    clip: str
    verdict: str = "correct"
    differentiable: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Objects that are too many cost without bound where the verdict is graded."""
        return (-math.inf if self.verdict == "graded" else 0.0, 1.0)

    def __post_init__(self) -> None:
        """ValueError for an unknown verdict."""
        if self.verdict not in VERDICTS:
            raise ValueError(
                f"reward {self.name!r}: verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}"
            )

    @on_images()
    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU.

        ValueError: metadata without a specification, or with a class that the detector does not know.
        """
        for prompt, given in zip(prompts, metadata, strict=True):
            if not given.get("include"):
                raise ValueError(
                    f"reward {self.name!r} needs the objects of {shorten(prompt, 80)!r}: add metadata in GenEval's "
                    'format, "tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}]'
                )
        detector, processor, clip, tokenizer = load_once(_load, self.weights, self.clip)
        known = set(class_names(detector).values())
        specs = [self._spec(prompt, given, known) for prompt, given in zip(prompts, metadata, strict=True)]
        scores = []
        with on_device(detector, self.weights, images.device), on_device(clip, self.weights, images.device):
            for image, spec in zip(images, specs, strict=True):
                least = COUNTING_THRESHOLD if spec.get("tag") == "counting" else THRESHOLD
                objects = detect(detector, processor, image, least)

                def colors_of(found: Sequence[Found], name: str, image: Tensor = image) -> list[str]:
                    return colors_by_clip(clip, tokenizer, image, found, name)

                scores.append(VERDICTS[self.verdict](objects, colors_of, spec))
        return torch.tensor(scores, dtype=torch.float32)

    def _spec(self, prompt: str, given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
        try:
            return read_spec(given, known, COLORS, "the detector")
        except ValueError as error:
            where = f"reward {self.name!r} cannot read the metadata of {shorten(prompt, 80)!r}"
            raise ValueError(f"{where}: {error}") from error


DETECTOR = "facebook/mask2former-swin-small-coco-instance"
# The page of the detector's weights says no more of their licence than "other"; Mask2Former's code is MIT.
FACTS = RewardCard("objects, number, colour and place asked for", 0.1, "arXiv 2310.11513", DETECTOR, "other", 497)


@register("geneval", FACTS, verdict="correct")
@register("geneval_graded", FACTS, verdict="graded")
def geneval(
    name: str,
    verdict: str,
    path: str = DETECTOR,
    clip: str = "openai/clip-vit-large-patch14",
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
) -> GenEvalReward:
    """Mask2Former and CLIP, or others of their kinds under ``path`` and ``clip``."""
    return GenEvalReward(name, Weights(path, revision, precision, offload), clip, verdict)
