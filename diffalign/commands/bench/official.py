"""Write images in the layout that the authors' own scripts read, so that their own judges can score them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffalign import media
from diffalign.atomic import replacing, write_text
from diffalign.benchmarks.protocol import Benchmark
from diffalign.commands.bench.columns import Column
from diffalign.commands.gallery import Gallery
from diffalign.files import read_bytes
from diffalign.structures import Prompt


def write_official(
    benchmark: Benchmark, gallery: Gallery, column: Column, prompts: Sequence[Prompt], indices: Sequence[int]
) -> Path:
    """Write the images of a column below ``official`` in its folder, a file per image or a grid per prompt."""
    folder = gallery.model_folder(column.spec) / "official"
    protocol, count = benchmark.protocol, gallery.sampling.images_per_prompt
    for position, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
        files = [gallery.file(column.spec, position, sample) for sample in range(count)]
        images = [image for file in files if (image := _open(file)) is not None]
        if len(images) < len(files):
            continue  # a warning has named the file that cannot be read
        names = [_name(protocol.layout, prompt, index, sample, count) for sample in range(count)]
        if protocol.grid is not None:
            _save(grid(images, protocol.grid[1]), folder / names[0])
            continue
        for image, name in zip(images, names, strict=True):
            _save(image, folder / name)
        if benchmark.name == "geneval":  # its script reads the specification beside the images
            line = json.dumps({**prompt.metadata, "prompt": prompt.text})
            write_text((folder / names[0]).parents[1] / "metadata.jsonl", line + "\n")
    return folder


def grid(images: Sequence[Image.Image], width: int) -> Image.Image:
    """Arrange images of one size row by row, without gaps."""
    size = images[0].size
    sheet = Image.new("RGB", (size[0] * width, size[1] * -(-len(images) // width)))
    for place, image in enumerate(images):
        sheet.paste(image, (place % width * size[0], place // width * size[1]))
    return sheet


def _open(file: Path) -> Image.Image | None:
    try:
        return media.decode(read_bytes(file))
    except media.BROKEN:
        return None


def _name(layout: str, prompt: Prompt, index: int, sample: int, count: int) -> str:
    own = {"id": index, "place": index, "tag": "all", **prompt.metadata, "text": prompt.text[:200]}
    own |= {"index": index, "sample": sample, "number": index * count + sample}
    plain = {key: value.replace("/", " ") if isinstance(value, str) else value for key, value in own.items()}
    return "/".join(part for part in layout.format_map(plain).split("/") if part not in ("", ".", ".."))


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    with replacing(path) as staged:
        image.save(staged, **({"quality": 95} if path.suffix in (".jpg", ".jpeg") else lossless))
