"""``diffalign check``: validate preference data or prompt files before training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from diffalign.commands.check_config import CheckConfig
from diffalign.commands.check_prompts import examine_prompts, prompts_text, too_long
from diffalign.config.unread import refuse_unread
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.images import digest, fetched, source_image
from diffalign.data.pairs import PairData, usable_images
from diffalign.data.stream import PairStream
from diffalign.data.unpaired import LabelledData
from diffalign.data.validation import EXAMPLES, fault_lines
from diffalign.files import shorten, some
from diffalign.structures import Input, LabelledImage, Pair, text_of


@dataclass
class Tally:
    """Label counts of a data set."""

    good: int = 0
    decided: int = 0
    first: int = 0
    ties: int = 0
    soft: int = 0

    def add(self, sample: Pair | LabelledImage) -> None:
        """Count the label of a sample; a liked image counts as a pair whose first image is preferred."""
        label = sample.label if isinstance(sample, Pair) else float(sample.liked)
        self.good += 1
        self.decided += label != 0.5
        self.first += label > 0.5
        self.ties += label == 0.5
        self.soft += label not in (0, 0.5, 1)


class Repeats:
    """Find samples with the same prompt, the same source of an edit, and the same images in any order."""

    def __init__(self) -> None:
        self.seen: dict[bytes, tuple[str, bool | None]] = {}
        self.names: list[str] = []
        self.contradicting = 0

    def add(self, sample: Pair | LabelledImage) -> None:
        """Add a sample whose images are in memory."""
        digests = [digest(source) for source in sample.images]
        source = source_image(sample.prompt)
        edited = [] if source is None else ["source", digest(source)]
        text = "\0".join([sample.prompt.text, *edited, *sorted(digests)])
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        liked = sample.liked if isinstance(sample, LabelledImage) else _preferred(sample, digests)
        first = self.seen.setdefault(key, (sample.key, liked))
        if first[0] != sample.key:
            self.names.append(f"{sample.key} is {first[0]} again")
            self.contradicting += liked != first[1]


def _preferred(pair: Pair, digests: list[str]) -> bool | None:
    """Return whether the image with the smaller digest is preferred; None for a tie."""
    return None if pair.tie else (pair.label > 0.5) == (digests[0] <= digests[1])


def samples(data: PairData | LabelledData | PairStream) -> Iterable[Pair | LabelledImage]:
    """Iterate over all samples once."""
    return data.once() if isinstance(data, PairStream) else (data[i] for i in range(len(data)))


def examine(config: CheckConfig) -> dict[str, Any]:
    """Read the data once and return the report that ``run`` prints.

    Raises ValueError for data in an unknown format, or a ``scan`` below 1.
    """
    if config.scan is not None and config.scan < 1:
        raise ValueError(f"scan must be at least 1, got {config.scan}: leave it out to check all samples")
    encoders = config.encoders()
    data, settings = config.open(), config.settings()
    tally, repeats, sizes = Tally(), Repeats(), Counter[str]()
    prompts: dict[Input, None] = {}

    for sample, images in _usable(data, settings, config.scan):
        tally.add(sample)
        repeats.add(sample)
        sizes.update(f"{image.width} x {image.height}" for image in images)
        prompts[sample.prompt.input] = None

    texts = dict.fromkeys(map(text_of, prompts))
    summary = data.quarantine.summary()
    skipped = summary.pop("skipped")
    report = {
        "data": list(config.data),
        "good": tally.good,
        **summary,
        "first_preferred": tally.first / tally.decided if tally.decided else None,
        "ties": tally.ties + skipped.get("ties", 0),
        "unlabelled": skipped.get("unlabelled", 0),
        "soft_labels": tally.soft,
        "repeated": {"count": len(repeats.names), "contradicting": repeats.contradicting, "samples": repeats.names},
        "prompts": len(prompts),
        "long": [f"{length}: {shorten(text, 60)}" for text in texts if (length := too_long(text, encoders))],
        "sizes": dict(sizes.most_common()),
    }
    return {**report, "verdict": verdict(config, report)}


def _usable(
    data: PairData | LabelledData | PairStream, settings: PreferenceDataConfig, limit: int | None
) -> Iterator[tuple[Pair | LabelledImage, tuple[Image.Image, ...]]]:
    """Yield the usable samples with their images; the quarantine counts the others."""
    for index, sample in enumerate(tqdm(islice(samples(data), limit), unit="sample", disable=None)):
        data.quarantine.examined += 1
        in_memory = fetched(sample)
        if (images := usable_images(in_memory, settings, data.quarantine, count_kept=True)) is not None:
            if isinstance(data, PairData) and isinstance(in_memory, Pair):
                data.confirm(index, in_memory)
            yield in_memory, images


def verdict(config: CheckConfig, report: dict[str, Any]) -> list[str]:
    """List the reasons why training with these settings would stop; empty if it would run."""
    reasons = [
        f"{kind}: {report['faults'][kind]['count']}, and on_fault is error"
        for kind, action in config.on_fault.items()
        if action == "error" and report["faults"][kind]["count"]
    ]
    if config.ties == "error" and report["ties"]:
        reasons.append(f"{report['ties']} ties, and ties is error")
    if report["bad_share"] > config.max_bad_share:
        reasons.append(f"{report['bad_share']:.1%} cannot be used, max_bad_share is {config.max_bad_share:.1%}")
    return reasons if report["good"] else [*reasons, "no sample can be used"]


def text(report: dict[str, Any]) -> str:
    """Format the report as text."""
    balance = report["first_preferred"]
    share = "no label decides" if balance is None else f"the first image is preferred (or liked) in {balance:.1%}"
    sizes = [f"{size} ({count})" for size, count in list(report["sizes"].items())[:EXAMPLES]]
    rest = len(report["sizes"]) - len(sizes)
    repeated = report["repeated"]
    long = report["long"]
    parts = [
        f"{some(report['data'], 5, 200)}: {report['good']} good samples in {report['rows']} rows",
        f"labels: {share}; {report['ties']} ties, {report['unlabelled']} unlabelled, {report['soft_labels']} soft",
        f"prompts: {report['prompts']} different, {len(long)} too long for a text encoder",
        *(f"  {name}" for name in long[:EXAMPLES]),
        f"sizes: {', '.join(sizes) or 'none'}" + (f" and {rest} more" if rest else ""),
        f"repeated: {repeated['count']}, of which {repeated['contradicting']} contradict the first",
        *(f"  {shorten(name, 300)}" for name in repeated["samples"][:EXAMPLES]),
        *fault_lines(report["faults"]),
        *report["not_read"],
        *(f"a run would stop: {reason}" for reason in report["verdict"]),
    ]
    return "\n".join(parts)


def run(config: CheckConfig) -> int:
    """Print the report; return 1 if training with these settings would stop, else 0."""
    refuse_unread(config)
    report = examine_prompts(config.data, config.encoders()) if config.of_prompts else examine(config)
    to_text = prompts_text if config.of_prompts else text
    print(json.dumps(report, indent=1) if config.json else to_text(report))
    return 1 if report["verdict"] else 0
