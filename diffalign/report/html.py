"""Write a comparison as one self-contained HTML file: images in a grid, enlarged, sorted and filtered."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image

from diffalign.atomic import write_text
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.files import read_bytes
from diffalign.media import decode, fitted
from diffalign.structures import Prompt

BUDGET = 9_000_000  # bytes of a page; base64 takes four characters for three bytes
SMALL = 160  # pixels; images up to this width are embedded losslessly
ATTEMPTS = ((1024, 90), (768, 85), (512, 85), (512, 75), (384, 75), (256, 70), (192, 60))  # width, WebP quality
PROBES = 16  # images that estimate the size of an attempt


def write_page(
    path: str | Path,
    title: str,
    prompts: Sequence[Prompt],
    models: Mapping[str, ScoredImages],
    sources: bool = False,
) -> None:
    """Write a page that shows the first image of each prompt by each model, its scores below.

    Tables give means over the images shown and, with several images per prompt, over all images. Gains are relative to
    the first model. With ``sources`` the source image of an edit stands before those of the models. Small images are
    embedded losslessly, larger ones as WebP at the best quality within ``BUDGET``.
    """
    first = {
        name: [int((judged.prompt == i).nonzero()[0]) for i in range(len(prompts))] for name, judged in models.items()
    }
    pictures = [[decode(read_bytes(judged.files[row])) for row in first[name]] for name, judged in models.items()]

    small = max(picture.width for column in pictures for picture in column) <= SMALL
    columns = _embedded(pictures, small)
    rewards = list(next(iter(models.values())).scores)
    rows = [
        {
            "prompt": prompt.text,
            **(_source(prompt, pictures[0][i].size, small) if sources else {}),
            "task": str(prompt.metadata.get("tag", "")),
            "images": [column[i] for column in columns],
            "sizes": [column[i].size for column in pictures],
            "scores": [
                [_plain(judged.scores[reward][first[name][i]].item()) for reward in rewards]
                for name, judged in models.items()
            ],
        }
        for i, prompt in enumerate(prompts)
    ]
    every = max(len(judged.prompt) for judged in models.values())
    content = {"title": title, "models": list(models), "rewards": rewards, "small": small, "rows": rows}
    if every > len(prompts):
        own = [[judged.scores[reward] for reward in rewards] for judged in models.values()]
        content["all"] = {
            "images": every,
            "each": f"{every / len(prompts):g}",
            "means": [[_plain(values.nanmean().item()) for values in row] for row in own],
            "scored": [[int(values.isfinite().sum()) for values in row] for row in own],
        }

    # "</script>" in a prompt would end the data block
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    # The data comes last: it may hold any text, the other marks included.
    page = _part("html").replace("/*STYLE*/", _part("css")).replace("/*CODE*/", _part("js")).replace("/*DATA*/", text)
    write_text(path, page)


def _part(kind: str) -> str:
    return files("diffalign.report").joinpath(f"page/compare.{kind}").read_text(encoding="utf-8")


def _source(prompt: Prompt, size: tuple[int, int], small: bool) -> dict[str, str]:
    """Return the source image of an edit, fitted to the result's (width, height); nothing for other prompts."""
    given = prompt.input
    if isinstance(given, str):
        return {}
    picture = fitted(read_bytes(Path(given.image)), size[::-1])
    return {"source": _uri(picture, "PNG", optimize=True) if small else _webp(picture, *ATTEMPTS[-1])}


def _embedded(pictures: Sequence[Sequence[Image.Image]], small: bool) -> list[list[str]]:
    """Encode images as data URIs, at the first size and quality within ``BUDGET``."""
    if small:
        return [[_uri(picture, "PNG", optimize=True) for picture in column] for column in pictures]
    every = [picture for column in pictures for picture in column]
    few = every[:: -(-len(every) // PROBES)]
    for width, quality in ATTEMPTS[:-1]:
        # estimate from a few images first
        if sum(len(_webp(picture, width, quality)) for picture in few) * len(every) > 1.5 * BUDGET * len(few):
            continue
        found = [[_webp(picture, width, quality) for picture in column] for column in pictures]
        if sum(len(uri) for column in found for uri in column) <= BUDGET:
            return found
    return [[_webp(picture, *ATTEMPTS[-1]) for picture in column] for column in pictures]


def _webp(picture: Image.Image, width: int, quality: int) -> str:
    return _uri(_at_most(picture, width), "WEBP", quality=quality)


def _at_most(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
