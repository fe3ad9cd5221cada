"""GenEval (arXiv 2310.11513): check objects, counts, colours and positions with a detector and CLIP.

Re-implemented on models of transformers. Departures from the published code: 1. the detector has the same architecture,
with the weights and preprocessing of transformers instead of mmdet; 2. colours are classified by transformers' CLIP; 3.
a class that the detector does not know is an error, where the published code counts it as absent.
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
BACKGROUND = 0x99 / 255  # grey around an object whose colour is classified
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # minimum confidence of a detection
MAX_OBJECTS = 16  # per class
POSITION_MARGIN = 0.1  # minimum distance of centres, as a fraction of both objects' sizes
# COCO class name -> GenEval's name; some detectors keep the names of Pascal VOC.
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
    """A detected object: its box (left, top, right, bottom) in pixels, its mask (H, W), and the confidence in it."""

    box: tuple[float, float, float, float]
    mask: Tensor
    score: float = 1.0


Objects = Mapping[str, Sequence[Found]]
ColorsOf = Callable[[Sequence[Found], str], list[str]]


def relations(a: Found, b: Found) -> set[str]:
    """Return the relations of ``a`` to ``b``: up to two of "left of", "right of", "above" and "below"."""
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
    """Return 1 if all specified objects are present in their colours and positions and no excluded one is, else 0."""
    right = True
    groups: list[Sequence[Found] | None] = []
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
    """Return partial credit as the reward server of Flow-GRPO (arXiv 2505.05470): the mean of several terms.

    Each specified class adds 1 - |found - count| / count, which is negative beyond twice the count. If the number is
    wrong, colour and position together add a 0. If it is right, the colour adds the fraction of objects that have it;
    if all have it, the position adds a 0 if an object violates the relation, and a 1 if the reference object exists.
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
            # The published code adds this 1 whenever the reference object exists, even if the relation is violated.
            parts += [] if groups[wanted["position"][1]] is None else [1.0]
        groups.append(found if good else None)

    return sum(parts) / len(parts)


def _placed(found: Sequence[Found], groups: Sequence[Sequence[Found] | None], position: tuple[str, int]) -> bool:
    relation, target = position
    reference = groups[target]
    return reference is not None and all(relation in relations(a, b) for a in found for b in reference)


VERDICTS: dict[str, Callable[[Objects, ColorsOf, Mapping[str, Any]], float]] = {"correct": correct, "graded": graded}


def load_detector(weights: Weights) -> tuple[Any, Any]:
    """Load a detector of transformers for instance segmentation, and its processor."""
    detector, report = AutoModelForUniversalSegmentation.from_pretrained(
        weights.path, revision=weights.revision, output_loading_info=True, trust_remote_code=False
    )
    # Unexpected keys are allowed: old checkpoints store buffers that are computed now.
    check_report({key: report[key] for key in ("missing_keys", "mismatched_keys")}, weights.path, "a detector")
    processor = AutoImageProcessor.from_pretrained(weights.path, revision=weights.revision, trust_remote_code=False)
    return frozen(detector, weights), processor


def _load(weights: Weights, clip: str) -> tuple[Any, Any, CLIPModel, Any]:
    colors, tokenizer = load_clip(*split(clip)), AutoTokenizer.from_pretrained(**pinned(clip), trust_remote_code=False)
    return *load_detector(weights), frozen(colors, weights), tokenizer


def class_names(detector: Any) -> dict[int, str]:
    """Return the detector's classes under GenEval's names."""
    return {label: RENAMED.get(name, name) for label, name in detector.config.id2label.items()}


def detect(detector: Any, processor: Any, image: Tensor, threshold: float) -> dict[str, list[Found]]:
    """Detect the objects of an image (3, H, W), float, [0, 1]: by class, in order of decreasing confidence."""
    pixels = processor(to_bytes(image), return_tensors="pt").to(image.device, detector.dtype)
    (result,) = processor.post_process_instance_segmentation(
        detector(**pixels), threshold=threshold, target_sizes=[tuple(image.shape[-2:])], return_binary_maps=True
    )
    objects: dict[str, list[Found]] = {}
    segments = result["segments_info"]
    for index in sorted(range(len(segments)), key=lambda i: -segments[i]["score"]):
        mask = result["segmentation"][index].bool().cpu()
        same = objects.setdefault(class_names(detector)[segments[index]["label_id"]], [])
        if len(same) < MAX_OBJECTS:
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
            same.append(Found(box, mask, float(segments[index]["score"])))
    return objects


def colors_by_clip(model: CLIPModel, tokenizer: Any, image: Tensor, found: Sequence[Found], name: str) -> list[str]:
    """Classify the colour of each object, cut out on grey, by CLIP similarity."""
    lines = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
    text = text_embeddings(model, tokenizer, lines).view(len(COLORS), len(TEMPLATES), -1).mean(1)
    names = []
    for item in found:
        left, top, right, bottom = map(int, item.box)
        cut = torch.where(item.mask.to(image.device), image, BACKGROUND)[:, top:bottom, left:right]
        similarity = image_embeddings(model, cut[None], True, centre_round) @ F.normalize(text, dim=-1).T
        names.append(COLORS[int(similarity.argmax())])
    return names


@dataclass(frozen=True)
class GenEvalReward:
    """Check images against the specification in each prompt's metadata, in GenEval's format.

    Args:
        name: under which scores are stored.
        weights: of the detector.
        clip: folder, or hub id with or without @revision, of the colour classifier.
        verdict: a key of ``VERDICTS``.
        differentiable: False.
    """

    name: str
    weights: Weights
    clip: str
    verdict: str = "correct"
    differentiable: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest score; surplus objects lower the graded verdict without bound."""
        return (-math.inf if self.verdict == "graded" else 0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the verdict."""
        if self.verdict not in VERDICTS:
            raise ValueError(
                f"reward {self.name!r}: verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}"
            )

    @on_images()
    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU.

        Raises ValueError for metadata without a specification, or with a class that the detector does not know.
        """
        for prompt, data in zip(prompts, metadata, strict=True):
            if not data.get("include"):
                raise ValueError(
                    f"reward {self.name!r} needs the objects of {shorten(prompt, 80)!r}: add metadata in GenEval's "
                    'format, "tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}]'
                )
        detector, processor, clip, tokenizer = load_once(_load, self.weights, self.clip)
        known = set(class_names(detector).values())
        specs = [self._spec(prompt, data, known) for prompt, data in zip(prompts, metadata, strict=True)]

        scores = []
        with on_device(detector, self.weights, images.device), on_device(clip, self.weights, images.device):
            for image, spec in zip(images, specs, strict=True):
                least = COUNTING_THRESHOLD if spec.get("tag") == "counting" else THRESHOLD
                objects = detect(detector, processor, image, least)

                def colors_of(found: Sequence[Found], name: str, image: Tensor = image) -> list[str]:
                    return colors_by_clip(clip, tokenizer, image, found, name)

                scores.append(VERDICTS[self.verdict](objects, colors_of, spec))

        return torch.tensor(scores, dtype=torch.float32)

    def _spec(self, prompt: str, data: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
        try:
            return read_spec(data, known, COLORS, "the detector")
        except ValueError as error:
            where = f"reward {self.name!r} cannot read the metadata of {shorten(prompt, 80)!r}"
            raise ValueError(f"{where}: {error}") from error


DETECTOR = "facebook/mask2former-swin-small-coco-instance"
# The hub states the licence of the detector's weights as "other"; Mask2Former's code is MIT.
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
    """Build GenEval on Mask2Former and CLIP, or on other models of these kinds at ``path`` and ``clip``."""
    return GenEvalReward(name, Weights(path, revision, precision, offload), clip, verdict)
