"""Choose the pairs that are worth a label next, and write them as a table that ``diffalign label`` reads.

A label teaches most about a pair that the judge cannot decide: with the probabilities p_r of its raters that the first
image is preferred, pairs are sorted by the entropy of their mean, largest first, whether raters are unsure or disagree.
A prompt comes again only after all others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import media
from diffalign.atomic import replacing
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import LABELLESS
from diffalign.data.pairs import open_part, usable_images
from diffalign.data.validation import Quarantine
from diffalign.rewards.support.images import from_pil
from diffalign.rewards.support.judge_network import JudgeNetwork, preprocess_of, tokenize
from diffalign.structures import Pair

MOST_RATERS = 16  # whose probabilities are averaged
COLUMNS = {
    "caption": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "image_0_uid": "string",
    "image_1_uid": "string",
    "label_0": "float64",
    "label_1": "float64",
    "has_label": "bool",
    "probability": "float64",
    "disagreement": "float64",
}


@dataclass(frozen=True)
class Candidate:
    """A pair that may be labelled next.

    Attributes:
        pair: The pair.
        labelled: Whether it has a label.
        probabilities: (R,), that the first image is preferred, by each rater.
    """

    pair: Pair
    labelled: bool
    probabilities: Tensor

    @property
    def mean(self) -> float:
        """Mean probability."""
        return self.probabilities.mean().item()

    @property
    def certainty(self) -> float:
        """Distance of the mean probability from 1/2, by which the entropy falls."""
        return abs(self.mean - 0.5)


@torch.no_grad()
def probabilities(network: JudgeNetwork, arguments: dict[str, Any]) -> Tensor:
    """Return (B, R) probabilities that the first image is preferred, by each of at most ``MOST_RATERS`` raters."""
    images, texts = arguments["images"], arguments["texts"]
    if not arguments.get("pooled"):
        images = network.pool_images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        texts = network.pool_texts(texts, arguments["mask"])
    raters = range(min(network.raters, MOST_RATERS)) if network.raters else [None]
    found = []
    for rater in raters:
        row = None if rater is None else torch.full((len(texts),), rater, device=texts.device)
        scores = network(images, texts, rater=row, pooled=True)
        found.append((scores[:, 0] - scores[:, 1]).double().sigmoid().cpu())
    return torch.stack(found, 1)


def read_candidates(
    sources: Sequence[str], settings: PreferenceDataConfig, network: JudgeNetwork, tokenizer: Any, size: int
) -> list[Candidate]:
    """Read all pairs of sources, labelled or not, and judge them; unusable ones are left out.

    Args:
        sources: Files, folders or hub ids.
        settings: How they are read.
        network: The judge.
        tokenizer: Its tokenizer.
        size: Pairs per forward pass.
    """
    quarantine = Quarantine(settings.on_fault, settings.max_bad_share)
    found: list[Candidate] = []
    waiting: list[tuple[Pair, bool, Tensor]] = []
    config, preprocess = network.backbone.config, preprocess_of(network.backbone.config)
    device = next(network.parameters()).device

    def judge() -> None:
        ids, mask = tokenize(tokenizer, config, [pair.prompt.text for pair, _, _ in waiting])
        arguments = {"images": torch.stack([pixels for _, _, pixels in waiting]).to(device), "texts": ids.to(device)}
        rows = probabilities(network, {**arguments, "mask": None if mask is None else mask.to(device)})
        found.extend(Candidate(pair, own, row) for (pair, own, _), row in zip(waiting, rows, strict=True))
        waiting.clear()

    for pair, labelled in _pairs(sources, settings, quarantine):
        if (images := usable_images(pair, settings, quarantine)) is not None:
            waiting.append((pair, labelled, torch.cat([preprocess(from_pil(i)[None], quantize=True) for i in images])))
        if len(waiting) == size:
            judge()
    if waiting:
        judge()
    return found


def _pairs(
    sources: Sequence[str], settings: PreferenceDataConfig, quarantine: Quarantine
) -> Iterator[tuple[Pair, bool]]:
    for source in sources:
        for _, _, pair, label in open_part(source, settings, LABELLESS).pairs(quarantine):
            yield pair, label is not None


def choose(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Choose pairs without a label if there are any, else labelled ones, the least certain first, prompts in turn."""
    unlabelled = [candidate for candidate in candidates if not candidate.labelled]
    ranked = sorted(unlabelled or candidates, key=lambda candidate: candidate.certainty)
    turns: Counter[str] = Counter()
    in_turn = []
    for candidate in ranked:
        text = candidate.pair.prompt.text
        in_turn.append((turns[text], candidate))
        turns[text] += 1
    return [candidate for _, candidate in sorted(in_turn, key=lambda pair: pair[0])][:count]


def write_table(path: Path, chosen: Sequence[Candidate]) -> Path | None:
    """Write pairs in Pick-a-Pic's columns, without labels; return the file, or None where no image can be read."""
    import pyarrow as arrow
    from pyarrow import parquet

    rows = [row for candidate in chosen if (row := _row(candidate)) is not None]
    if not rows:
        path.unlink(missing_ok=True)
        return None
    types = [(name, getattr(arrow, "bool_" if kind == "bool" else kind)()) for name, kind in COLUMNS.items()]
    with replacing(path) as staged:
        parquet.write_table(arrow.Table.from_pylist(rows, schema=arrow.schema(types)), staged)
    return path


def _row(candidate: Candidate) -> dict[str, Any] | None:
    try:
        files = [image.read() for image in candidate.pair.images]
    except media.BROKEN:
        return None
    uids = [hashlib.blake2b(file, digest_size=16).hexdigest() for file in files]
    return {
        "caption": candidate.pair.prompt.text,
        "jpg_0": files[0],
        "jpg_1": files[1],
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "label_0": None,
        "label_1": None,
        "has_label": False,
        "probability": candidate.mean,
        "disagreement": candidate.probabilities.std(correction=0).item(),
    }
