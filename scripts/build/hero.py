"""Draw the first picture of the README: chosen held-out prompts, base above, tuned below.

    diffalign eval tuned=runs/shapes --output_dir runs/hero
    python scripts/build/hero.py runs/hero --candidates  # candidates-N.png: what the tuned model alone gets right
    python scripts/build/hero.py runs/hero               # assets/pictures/hero.png

The images are those of ``diffalign eval``, enlarged; both models draw a prompt from the same noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.data.prompts import load_prompts
from diffalign.shapes import judge_batch
from scripts import ROOT

PROMPTS = ROOT / "assets/prompts/shapes_held_out.jsonl"
PICTURE = ROOT / "assets/pictures/hero.png"
MODELS = ("base", "tuned")
PICKS: tuple[tuple[int, int], ...] = ()
SIDE = 192  # pixels of an enlarged image
CANDIDATES = 96
RIGHT, WRONG = "#2e8b57", "#c0504d"


def read(folder: Path, model: str, pick: tuple[int, int]) -> Image.Image:
    """Read the image of a model for (prompt index, sample index)."""
    return Image.open(folder / f"images/{model}/images/{pick[0]:05d}-{pick[1]}.png").convert("RGB")


def verdicts(folder: Path, model: str, picks: Sequence[tuple[int, int]]) -> list[bool]:
    """Judge by the strict rule whether each image shows exactly what its prompt asks for."""
    prompts = load_prompts(PROMPTS)
    pixels = [torch.from_numpy(np.array(read(folder, model, pick))).permute(2, 0, 1) / 255 for pick in picks]
    found = judge_batch(torch.stack(pixels), [prompts[prompt].metadata for prompt, _ in picks])
    return [bool(verdict.strict) for verdict in found]


def gained(folder: Path) -> list[tuple[int, int]]:
    """List the (prompt, sample) that the tuned model alone gets right, in the order of the prompts."""
    files = sorted((folder / "images/base").glob("scores-*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    picks = sorted({(int(row["prompt"]), int(row["sample"])) for row in rows})
    base, tuned = (verdicts(folder, model, picks) for model in MODELS)
    return [pick for pick, before, after in zip(picks, base, tuned, strict=True) if after and not before]


def show(axes: Axes, image: Image.Image, right: bool) -> None:
    """Draw an enlarged image with a frame in the colour of its verdict."""
    axes.imshow(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(RIGHT if right else WRONG)
        spine.set_linewidth(2.5)


def draw(folder: Path, picks: Sequence[tuple[int, int]], path: Path) -> None:
    """Draw a column per pick: its prompt, the base image, the tuned image."""
    prompts = load_prompts(PROMPTS)
    figure = Figure(figsize=(1.55 * len(picks) + 0.5, 3.75), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(picks), squeeze=False)
    for row, model in zip(grid, MODELS, strict=True):
        row[0].set_ylabel(model, fontsize=15)
        for axes, pick, right in zip(row, picks, verdicts(folder, model, picks), strict=True):
            show(axes, read(folder, model, pick), right)
    for axes, (prompt, _) in zip(grid[0], picks, strict=True):
        axes.set_title("\n".join(textwrap.wrap(prompts[prompt].text, 15)), fontsize=12.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def sheet(folder: Path, picks: Sequence[tuple[int, int]], path: Path) -> None:
    """Draw candidates, base beside tuned, with the pair of numbers that ``PICKS`` takes."""
    prompts = load_prompts(PROMPTS)
    columns = 8
    rows = -(-len(picks) // columns)
    figure = Figure(figsize=(2.1 * columns, 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, pick in zip(grid, picks, strict=False):
        both = [np.asarray(read(folder, model, pick)) for model in MODELS]
        axes.imshow(np.concatenate(both, axis=1))
        axes.set_title(f"{pick}\n" + textwrap.fill(prompts[pick[0]].text, 30), fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output of diffalign eval")
    parser.add_argument("--candidates", action="store_true")
    args = parser.parse_args()
    if not args.candidates:
        draw(args.folder, PICKS, PICTURE)
        return
    picks = gained(args.folder)
    for start in range(0, len(picks), CANDIDATES):
        sheet(args.folder, picks[start : start + CANDIDATES], args.folder / f"candidates-{start // CANDIDATES}.png")
    print(f"{len(picks)} candidates")


if __name__ == "__main__":
    main()
