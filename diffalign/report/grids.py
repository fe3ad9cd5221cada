"""Draw image grids: a plain grid, and models side by side for the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign.atomic import replacing
from diffalign.report.fonts import SIZE, drawable, font_of, own

GAP = 8  # pixels between cells
CELL = (128, 256)  # smallest and largest width of an image in a comparison, in pixels
TEXT_WIDTH = 200
FONT = SIZE
SOURCE = "source"  # title of the column of source images
PAPER, INK, GREY, GREEN, RED = "white", "#202020", "#808080", "#1a8f3c", "#c8322b"


@dataclass(frozen=True)
class OverallMeans:
    """Means over all evaluated images, of which a grid shows some.

    Attributes:
        images: Number of images per model.
        means: Reward -> model -> mean, NaN if no image has a score.
        each: Images per prompt.
    """

    images: int
    means: Mapping[str, Mapping[str, float]]
    each: float = 1.0


def image_grid(images: Tensor, columns: int, labels: Sequence[str] | None = None, scale: int = 2) -> Image.Image:
    """Arrange images row by row.

    Args:
        images: (N, 3, H, W), in [0, 1].
        columns: Images per row.
        labels: One per image, drawn below it and truncated to its width.
        scale: Factor by which images are enlarged.

    Raises:
        ValueError: No images, a number below 1, or not one label per image.
    """
    if len(images) == 0 or columns < 1 or scale < 1:
        raise ValueError(f"{len(images)} images, {columns} columns, scale {scale}: each must be at least 1")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: pass one label per image")
    width, height = images.shape[3] * scale, images.shape[2] * scale
    texts = drawable(labels or ())
    line = FONT + 6 if labels is not None else 0
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + rows * (height + line + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + line + GAP)
        sheet.paste(_picture(image, width), (x, y))
        if labels is not None:
            _centred(draw, texts[i], x, y + height, width)
    return sheet


def compare_grid(
    columns: Mapping[str, Tensor],
    prompts: Sequence[str],
    scores: Mapping[str, Mapping[str, Tensor]] | None,
    path: str | Path,
    totals: OverallMeans | None = None,
    sources: Tensor | None = None,
) -> None:
    """Write a comparison image: a row per prompt, a column per model, scores below each image.

    A reward whose scores are all 0 or 1 is drawn as green ticks and red crosses, others as numbers (the best of a row
    in green), NaN as a dash. The header gives the mean of each model over the rows shown, and over all images; a line
    at the foot says how many these are.

    Args:
        columns: Model -> images (P, 3, H, W) in [0, 1], one per prompt.
        prompts: P prompts.
        scores: Model -> reward -> (P,), higher is better; None draws no scores.
        path: Output file.
        totals: Means over all evaluated images; None if the rows are all of them.
        sources: Source images of edits, (P, 3, H, W), for a first column without scores.

    Raises:
        ValueError: No column or prompt, or lengths differ.
    """
    _check(columns, prompts, scores)
    columns = dict(columns) if sources is None else {SOURCE: sources, **columns}
    width = min(max(next(iter(columns.values())).shape[3], CELL[0]), CELL[1])
    pictures = {name: [_picture(image, width) for image in images] for name, images in columns.items()}
    rewards = list(next(iter(scores.values()))) if scores is not None else []
    tables = {reward: {name: own[reward] for name, own in scores.items()} for reward in rewards} if scores else {}
    line = FONT + 8
    foot = line * len(rewards)
    texts = [_wrap(prompt, TEXT_WIDTH) for prompt in drawable(prompts)]
    tallest = max(picture.height for row in pictures.values() for picture in row)
    heights = [max(tallest + foot, len(text) * (FONT + 4)) for text in texts]
    lines = _means(tables, totals)
    header = (1 + len(lines)) * (FONT + 6)
    wide = TEXT_WIDTH + 2 * GAP + len(columns) * (width + GAP)
    notes = _wrap(_note(len(prompts), totals), wide - 2 * GAP) if tables else []
    below = header + sum(heights) + GAP * (len(prompts) + 1)
    size = (wide, below + len(notes) * (FONT + 4) + GAP * bool(notes))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, (name, title) in enumerate(zip(columns, drawable(columns), strict=True)):
        x = TEXT_WIDTH + 2 * GAP + j * (width + GAP)
        _centred(draw, title, x, GAP / 2, width)
        for k, values in enumerate(lines.values(), start=1):
            _centred(draw, values.get(name, ""), x, GAP / 2 + k * (FONT + 6), width, GREY)
        y = header + GAP
        for i, picture in enumerate(pictures[name]):
            sheet.paste(picture, (x, y))
            for k, (reward, table) in enumerate(tables.items()):
                if name not in table:
                    continue
                middle = y + picture.height + line * (k + 0.5)
                _mark(draw, table, name, i, x + width * (0.5 if len(rewards) == 1 else 0.8), middle)
                if len(rewards) > 1:
                    draw.text(
                        (x, middle), _cut(draw, reward, 0.6 * width), fill=GREY, font=font_of(reward), anchor="lm"
                    )
            y += heights[i] + GAP
    for k, label in enumerate(lines, start=1):
        position = (GAP, GAP / 2 + k * (FONT + 6) + FONT / 2 + 3)
        draw.text(position, _cut(draw, label, TEXT_WIDTH), fill=GREY, font=font_of(label), anchor="lm")
    _write_prompts(draw, texts, heights, header, size[0])
    for k, note in enumerate(notes):
        draw.text((GAP, below + k * (FONT + 4)), note, fill=GREY, font=font_of(note))
    with replacing(path) as staged:
        sheet.save(staged)


def _check(
    columns: Mapping[str, Tensor], prompts: Sequence[str], scores: Mapping[str, Mapping[str, Tensor]] | None
) -> None:
    if not columns or not prompts:
        raise ValueError(f"{len(columns)} columns, {len(prompts)} prompts: a comparison needs at least one of each")
    for name, images in columns.items():
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images of {name!r} for {len(prompts)} prompts: pass one image per prompt")
        if scores is not None and not (scores.get(name) and all(len(v) == len(prompts) for v in scores[name].values())):
            raise ValueError(f"no score per prompt for {name!r}: pass {len(prompts)} scores for each column, or None")


def _write_prompts(
    draw: ImageDraw.ImageDraw, texts: Sequence[Sequence[str]], heights: Sequence[int], header: int, width: int
) -> None:
    y = header + GAP
    for text, height in zip(texts, heights, strict=True):
        draw.line((GAP, y - GAP / 2, width - GAP, y - GAP / 2), fill="#dddddd")
        draw.multiline_text((GAP, y), "\n".join(text), fill=INK, font=font_of("".join(text)), spacing=4)
        y += height + GAP


def _means(tables: Mapping[str, Mapping[str, Tensor]], totals: OverallMeans | None) -> dict[str, dict[str, str]]:
    """Return header label -> model -> formatted mean. Labels start with the set, as long labels are truncated."""
    found = {}
    for reward, table in tables.items():
        count = len(next(iter(table.values())))
        found[f"mean of {count}: {reward}"] = {name: _mean(values) for name, values in table.items()}
        if totals is not None:
            found[f"mean of {totals.images}: {reward}"] = {
                name: "–" if math.isnan(mean) else f"{mean:.3g}" for name, mean in totals.means[reward].items()
            }
    return found


def _note(shown: int, totals: OverallMeans | None) -> str:
    """Say what the means of the header are over."""
    note = f"Means over the {shown} images shown, 1 per prompt"
    return f"{note}, and over all {totals.images} images, {totals.each:g} per prompt." if totals else f"{note}."


def _mean(values: Tensor) -> str:
    scored = values[values.isfinite()].cpu().double()
    if not len(scored):
        return "–"
    return f"{scored.mean().item():.3g}" + (f" ({len(scored)} scored)" if len(scored) < len(values) else "")


def _mark(draw: ImageDraw.ImageDraw, scores: Mapping[str, Tensor], name: str, row: int, x: float, y: float) -> None:
    """Draw the score of one image centred at (x, y); tick and cross are lines, as fonts may lack them."""
    value = float(scores[name][row])
    if math.isnan(value):
        draw.line((x - 5, y, x + 5, y), fill=GREY, width=2)
    elif not all(v in (0, 1) or math.isnan(v) for column in scores.values() for v in column.tolist()):
        others = [v for column in scores.values() if not math.isnan(v := float(column[row]))]
        best = value == max(others) > min(others)
        draw.text((x, y), f"{value:.3g}", fill=GREEN if best else INK, font=own(), anchor="mm")
    elif value == 1:
        draw.line((x - 6, y, x - 2, y + 5, x + 7, y - 6), fill=GREEN, width=3, joint="curve")
    else:
        draw.line((x - 5, y - 5, x + 5, y + 5), fill=RED, width=3)
        draw.line((x - 5, y + 5, x + 5, y - 5), fill=RED, width=3)


def _picture(image: Tensor, width: int) -> Image.Image:
    """Resize an image (3, H, W) in [0, 1] to ``width``; integer factors repeat pixels without smoothing."""
    values = image.detach().float().nan_to_num().clamp(0, 1)
    picture = Image.fromarray((values * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    size = (width, round(picture.height * width / picture.width))
    return picture.resize(size, Image.Resampling.NEAREST if width % picture.width == 0 else Image.Resampling.LANCZOS)


def _centred(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, width: int, fill: str = INK) -> None:
    """Draw one centred line, truncated to ``width``."""
    draw.text((x + width / 2, y + FONT / 2 + 3), _cut(draw, text, width), fill=fill, font=font_of(text), anchor="mm")


def _cut(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """Truncate a text to ``width`` pixels, with an ellipsis."""
    shown, font = text, font_of(text)
    while shown and draw.textlength(shown, font=font) > width:
        text = text[:-1]
        shown = f"{text}…" if text else ""
    return shown


def _wrap(text: str, width: int) -> list[str]:
    """Wrap a text to lines of at most ``width`` pixels; longer words are broken."""
    font = font_of(text)
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while font.getlength(lines[-1]) > width:
            fits = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines
