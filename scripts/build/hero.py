"""Draw the first picture of the README: chosen held-out prompts, base above, tuned below.

    python scripts/build/hero.py  # assets/pictures/hero.png

The images are taken out of ``assets/pictures/compare.png``, the unselected grid that ``diffalign compare runs/shapes
--limit 24`` drew of the quickstart at seed 0: it shows them enlarged by a whole factor, so no pixel is lost.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.data.prompts import load_prompts
from diffalign.shapes import judge_batch
from scripts import ROOT

GRID = ROOT / "assets/pictures/compare.png"
PICTURE = ROOT / "assets/pictures/hero.png"
PROMPTS = ROOT / "assets/prompts/shapes_validation.jsonl"
MODELS = ("base", "tuned")
# Row of the grid -> its prompt.
PICKS = {
    7: "a poster with a green circle",
    6: "a diagram with a purple square",
    9: "a sign with a square above a triangle",
    2: "a graphic with a circle and a triangle",
    1: "a picture showing a triangle",
    0: "a sticker with a square",
}
CELL, SIDE = 128, 64  # pixels of an image in the grid, and as the model drew it
SHOWN = 256  # pixels of an image before the figure is drawn
RIGHT, WRONG = "#2e8b57", "#c0504d"
Pixels = NDArray[np.uint8]


def spans(filled: NDArray[np.bool_]) -> list[int]:
    """Find the starts of the stretches of ``CELL`` true values."""
    edges = np.flatnonzero(np.diff(np.r_[0, filled.astype(int), 0]))
    return [int(start) for start, end in zip(edges[::2], edges[1::2], strict=True) if end - start == CELL]


def cells(grid: Pixels) -> list[tuple[Pixels, ...]]:
    """Cut the grid into its rows of images, each (``SIDE``, ``SIDE``, 3), in the order of ``MODELS``."""
    ink = (grid != 255).any(-1)
    tops = spans(ink[:, grid.shape[1] - CELL // 2])
    lefts = spans(ink[tops[0] + CELL // 2])
    factor = CELL // SIDE
    return [tuple(grid[y : y + CELL : factor, x : x + CELL : factor] for x in lefts) for y in tops]


def chosen() -> list[tuple[str, tuple[Pixels, ...], tuple[bool, ...]]]:
    """Return the prompt, the images and the verifier's strict verdicts of each pick."""
    rows = cells(np.asarray(Image.open(GRID).convert("RGB")))
    metadata = {prompt.text: prompt.metadata for prompt in load_prompts(PROMPTS)}
    found = []
    for row, prompt in PICKS.items():
        pixels = torch.from_numpy(np.stack(rows[row])).permute(0, 3, 1, 2) / 255
        verdicts = judge_batch(pixels, [metadata[prompt]] * len(MODELS))
        found.append((prompt, rows[row], tuple(bool(verdict.strict) for verdict in verdicts)))
    return found


def show(axes: Axes, pixels: Pixels, right: bool) -> None:
    """Draw an enlarged image with a frame in the colour of its verdict."""
    axes.imshow(np.asarray(Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("right" if right else "wrong", fontsize=11, color=RIGHT if right else WRONG, labelpad=3)
    for spine in axes.spines.values():
        spine.set_color(RIGHT if right else WRONG)
        spine.set_linewidth(2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    picks = chosen()
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(MODELS), len(picks))
    for column, (prompt, images, verdicts) in enumerate(picks):
        grid[0, column].set_title("\n".join(textwrap.wrap(prompt, 18)), fontsize=12.5)
        for row in range(len(MODELS)):
            show(grid[row, column], images[row], verdicts[row])
    for row, model in enumerate(MODELS):
        grid[row, 0].set_ylabel(model, fontsize=16, labelpad=8)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
