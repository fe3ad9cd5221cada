"""Count why images of the embedded world are wrong, by task, for every model of an evaluation.

    diffalign eval tuned=runs/flow_grpo_shapes_long_seeds/seed-2 --output_dir runs/eval_long
    python scripts/studies/what_fails.py runs/eval_long --name shapes_long_fails

Reads the images that ``diffalign eval`` left, of all prompts. Writes ``assets/results/NAME.csv`` and
``assets/pictures/NAME.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.data.prompts import load_prompts
from diffalign.shapes import TAGS, judge_batch
from diffalign.shapes.captions import Spec
from diffalign.shapes.verifier import Found
from diffalign.structures import Prompt
from scripts import ROOT

COLOURS = {
    "right": "#1f5fa8",
    "no clear shape": "#7d8894",
    "too few": "#c9b458",
    "too many": "#d98f4e",
    "other shapes": "#c25450",
    "other colour or place": "#8d6cab",
}


def reason(objects: Sequence[Found], spec: Spec, strict: bool) -> str:
    """A key of ``COLOURS``: the first that holds of what the verifier found."""
    wanted = sorted(item["class"] for item in spec["include"] for _ in range(item["count"]))
    if strict:
        return "right"
    if any(found.shape is None for found in objects):
        return "no clear shape"
    if len(objects) != len(wanted):
        return "too few" if len(objects) < len(wanted) else "too many"
    return "other colour or place" if sorted(found.shape for found in objects) == wanted else "other shapes"


def reasons(folder: Path, prompts: Sequence[Prompt]) -> Counter[tuple[str, str]]:
    """Count each (task, reason) among a model's images."""
    rows = [json.loads(line) for file in sorted(folder.glob("scores-*.jsonl")) for line in file.open()]
    found: Counter[tuple[str, str]] = Counter()
    for begin in range(0, len(rows), 256):
        part = rows[begin : begin + 256]
        files = [folder / "images" / f"{row['prompt']:05d}-{row['sample']}.png" for row in part]
        images = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files])
        specs = [prompts[row["prompt"]].metadata for row in part]
        for verdict, spec in zip(judge_batch(images.permute(0, 3, 1, 2) / 255, specs), specs, strict=True):
            found[spec["tag"], reason(verdict.objects, spec, verdict.strict)] += 1
    return found


def draw(tables: dict[str, Counter[tuple[str, str]]], path: Path) -> None:
    """Plot a bar per task and model, in percent of its images."""
    figure = Figure(figsize=(9, 0.7 + 0.24 * len(TAGS) * (len(tables) + 0.6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places, labels = [], []
    for t, tag in enumerate(TAGS):
        for m, (model, table) in enumerate(tables.items()):
            place = t * (len(tables) + 0.6) + m
            total, left = sum(table[tag, name] for name in COLOURS), 0.0
            for name, colour in COLOURS.items():
                share = 100 * table[tag, name] / total
                axes.barh(place, share, left=left, color=colour, height=0.85, label=name if not places else None)
                left += share
            places.append(place)
            labels.append(f"{tag}, {model}")
    axes.set_yticks(places, labels, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of held-out images", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=Path, default=ROOT / "assets/prompts/shapes_validation.jsonl")
    parser.add_argument("--name", default="what_fails")
    args = parser.parse_args()
    prompts = load_prompts(args.prompts)
    folders = [path.parent for path in args.folder.glob("images/*/images")]
    folders.sort(key=lambda folder: (folder.name != "base", folder.name))
    tables = {folder.name: reasons(folder, prompts) for folder in folders}
    path = ROOT / f"assets/results/{args.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "task", *COLOURS])
        for model, table in tables.items():
            writer.writerows([model, tag, *(table[tag, name] for name in COLOURS)] for tag in TAGS)
    draw(tables, ROOT / f"assets/pictures/{args.name}.png")
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
