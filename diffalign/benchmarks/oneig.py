"""OneIG-Bench, alignment (arXiv 2506.07977): a graph of questions about each image.

Protocol of OneIG-Bench/OneIG-Benchmark@41b4983, scripts/alignment/alignment_score.py: prompts of the classes anime,
human and object, four images each in a 2 x 2 grid that is cut again; Qwen2.5-VL-7B answers every question yes or no; a
question counts 0 where one that it depends on was answered no (the answers, not those already set to 0); an image
scores its share of ones, a prompt the mean of its images, and alignment is the mean over prompts. The other dimensions
(text, reasoning, style, diversity) use judges of their own and are not measured here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.benchmarks.protocol import Figures, Judged, Protocol, by, mean, register_benchmark
from diffalign.benchmarks.questions import graph_score, read_parents, said_yes, yes_or_no
from diffalign.data.prompts import load_prompts
from diffalign.files import read_text, shorten
from diffalign.structures import Prompt

CLASSES = {"anime": "Anime_Stylization", "human": "Portrait", "object": "General_Object"}
CSV, GRAPHS = "OneIG-Bench.csv", ("scripts/alignment/Q_D", "Q_D", ".")


def read(source: str) -> list[Prompt]:
    """Read a clone of the authors' repository: OneIG-Bench.csv and Q_D/*.json; or a .jsonl file of prompts."""
    folder = Path(source)
    if not folder.is_dir():
        return load_prompts(source)
    if not (folder / CSV).is_file():
        raise FileNotFoundError(f"{shorten(folder)} has no {CSV}: name a clone of OneIG-Bench/OneIG-Benchmark")
    texts = {
        (row["category"], row["id"]): row.get("prompt_en") or row.get("prompt", "")
        for row in csv.DictReader(io.StringIO(read_text(folder / CSV)))
    }
    return [prompt for name in CLASSES for prompt in _prompts(folder, name, texts)]


def _prompts(folder: Path, name: str, texts: Mapping[tuple[str, str], str]) -> list[Prompt]:
    file = next(
        (folder / place / f"{name}.json" for place in GRAPHS if (folder / place / f"{name}.json").is_file()), None
    )
    if file is None:
        raise FileNotFoundError(f"{shorten(folder)} has no Q_D/{name}.json: clone the repository with its scripts")
    found = []
    for key, item in json.loads(read_text(file)).items():
        text = texts.get((CLASSES[name], key)) or texts.get((name, key))
        if not text:
            raise ValueError(f"{shorten(file)}: {key} is not among the prompts of {CSV}: use both of one version")
        asked, above = _numbered(item["question"]), _numbered(item["dependency"])
        numbers = sorted(asked)
        place = {number: position for position, number in enumerate(numbers, start=1)}
        parents = [[place.get(int(one), 0) for one in above.get(number, [])] for number in numbers]
        found.append(
            Prompt(text, {"tag": name, "id": key, "questions": [asked[n] for n in numbers], "parents": parents})
        )
    return found


def _numbered(entry: Any) -> dict[int, Any]:
    """Return a mapping by number; some files hold it as JSON text."""
    return {int(key): value for key, value in (json.loads(entry) if isinstance(entry, str) else entry).items()}


PROTOCOL = Protocol(
    title="OneIG-Bench, alignment",
    source="arXiv 2506.07977, OneIG-Bench/OneIG-Benchmark@41b4983",
    size=695,
    images_per_prompt=4,
    judges={"vqa": yes_or_no("")},
    prompts=None,
    where="the prompts and questions of github.com/OneIG-Bench/OneIG-Benchmark are not part of this package; clone it "
    "and name the folder",
    comparable="Comparable with published alignment up to the wording around a question: the judge is the authors' "
    "Qwen2.5-VL-7B, whose first token decides instead of the generated word.",
    headline="alignment",
    read=read,
    needs=("tag", "id", "questions", "parents"),
    unread="text, reasoning, style and diversity need judges of their own",
    layout="{tag}/{id}.webp",
    grid=(2, 2),
)


@register_benchmark("oneig", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean over prompts, of all and by class."""
    return {"alignment": _mean(judged), **{name: _mean(own) for name, own in by(judged, "tag").items()}}


def _mean(judged: Sequence[Judged]) -> float:
    prompts: dict[int, list[float]] = {}
    for one in judged:
        answers = [said_yes(value) for value in one.answers["vqa"]]
        prompts.setdefault(one.index, []).append(graph_score(answers, read_parents(one.prompt.metadata), False))
    return mean(mean(images) for images in prompts.values())
