"""DPG-Bench (ELLA, arXiv 2403.05135): long prompts, judged by a graph of questions.

Protocol of TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py: 1065 prompts, four images each in one 2 x 2 grid, which
is cut again; every question is answered yes or no; walking the questions in the order of the file, one is set to 0 if a
question that it depends on is 0 by then; an image scores its share of ones, a prompt the mean of its images, and the
benchmark the mean of its prompts, in percent. Categories average the plain answers about the last image of each prompt.

Departure: the script skips the first row of the file, which makes the first prompt fail; it is read here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from diffalign.benchmarks.protocol import Figures, Judged, Protocol, mean, register_benchmark
from diffalign.benchmarks.questions import graph_score, read_parents, said_yes, yes_or_no
from diffalign.data.prompts import load_prompts
from diffalign.files import read_text, shorten
from diffalign.structures import Prompt

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


def read(source: str) -> list[Prompt]:
    """Read ``dpg_bench.csv``, a row per question, or a .jsonl file of prompts with their questions."""
    if Path(source).suffix != ".csv":
        return load_prompts(source)
    rows = list(csv.DictReader(io.StringIO(read_text(source))))
    if not rows or (absent := [name for name in COLUMNS if name not in rows[0]]):
        raise ValueError(f"{shorten(source)} is no dpg_bench.csv: it has no column {', '.join(absent or COLUMNS)}")
    items: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        items.setdefault(row["item_id"], []).append(row)
    return [_prompt(name, own, source) for name, own in items.items()]


def _prompt(name: str, rows: list[dict[str, str]], source: str) -> Prompt:
    try:
        place = {int(row["proposition_id"]): number for number, row in enumerate(rows, start=1)}
        parents = [[place.get(int(one), 0) for one in row["dependency"].split(",")] for row in rows]
    except ValueError as error:
        raise ValueError(f"{shorten(source)}: item {shorten(name, 40)}: {error}; download the file again") from error
    return Prompt(
        rows[0]["text"],
        {
            "id": name,
            "questions": [row["question_natural_language"] for row in rows],
            "parents": parents,
            "categories": [row["tuple"].split("(")[0].strip() for row in rows],
        },
    )


PROTOCOL = Protocol(
    title="DPG-Bench",
    source="arXiv 2403.05135, TencentQQGYLab/ELLA dpg_bench/compute_dpg_bench.py",
    size=1065,
    images_per_prompt=4,
    judges={"vqa": yes_or_no("mPLUG-large, fine-tuned on COCO VQA (ModelScope)")},
    prompts=None,
    where="dpg_bench.csv of github.com/TencentQQGYLab/ELLA, folder dpg_bench, is not part of this package; download "
    "it there",
    comparable="Not comparable one to one: the questions are answered by Qwen2.5-VL instead of mPLUG-large, which "
    "transformers does not have; --official_layout true writes the 2 x 2 grids that the authors' script reads.",
    headline="overall",
    read=read,
    needs=("id", "questions", "parents", "categories"),
    layout="{id}.png",
    grid=(2, 2),
)


@register_benchmark("dpg_bench", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean over prompts, and the mean of plain answers by first-level category, in percent."""
    prompts: dict[int, list[float]] = {}
    last: dict[int, Judged] = {}
    for one in judged:
        answers = [said_yes(value) for value in one.answers["vqa"]]
        prompts.setdefault(one.index, []).append(graph_score(answers, read_parents(one.prompt.metadata), True))
        if one.index not in last or one.sample > last[one.index].sample:
            last[one.index] = one
    categories: dict[str, list[float]] = {}
    for one in last.values():
        for category, value in zip(one.prompt.metadata["categories"], one.answers["vqa"], strict=True):
            categories.setdefault(category.split("-")[0].strip(), []).append(said_yes(value))
    found = {"overall": mean(mean(images) for images in prompts.values())}
    found |= {name: mean(values) for name, values in categories.items()}
    return {name: 100 * value for name, value in found.items()}
