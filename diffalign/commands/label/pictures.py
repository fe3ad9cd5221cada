"""Pair the images of several folders, one of each model, by their file names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from diffalign.commands.label.comparison import Comparison
from diffalign.commands.label.kinds import split_name
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.folders import caption, listed, pictures_below
from diffalign.data.prompts import load_prompts
from diffalign.data.tables import Table
from diffalign.files import bounded, printable, shorten, some
from diffalign.structures import ImageSource, Prompt

Picture = tuple[ImageSource, Prompt | None]


def pair_folders(texts: Sequence[str], settings: PreferenceDataConfig, prompts: Path | None) -> list[Comparison]:
    """Pair the images of equal file name, apart from the suffix, of every two folders.

    A prompt comes from ``metadata.jsonl`` or ``NAME.txt`` of either folder, or from ``prompts``: one for each file name
    in natural order, or one for all. Images without a partner are left out, with a line that counts them.

    Args:
        texts: Folders, as FOLDER or NAME=FOLDER; the name of a model is else that of its folder.
        settings: How files are read.
        prompts: File of prompts.

    Raises:
        ValueError: A single folder, two of one name, no file name in common, or an image without a prompt.
    """
    named = [(name or path.resolve().name, path) for name, path in map(split_name, texts)]
    if len(named) < 2:
        raise ValueError(f"{shorten(texts[0])} holds images of one model, which make no pair: name a second folder")
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        raise ValueError(f"two folders are called {some(twice)}: write NAME=FOLDER for each")
    folders = {name: read_pictures(path, settings) for name, path in named}
    stems = list(dict.fromkeys(stem for pictures in folders.values() for stem in pictures))
    common = {(a, b): [stem for stem in folders[a] if stem in folders[b]] for a, b in combinations(folders, 2)}
    for (a, b), shared in common.items():
        if not shared:
            raise ValueError(f"{a} and {b} have no file name in common: name the images of one prompt alike")
        if left := len(folders[a]) + len(folders[b]) - 2 * len(shared):
            print(f"{left} images of {a} and {b} have no partner of their name")
    texts_of = _prompts(stems, list(folders.values()), prompts)
    return [
        Comparison(f"{a}|{b}|{stem}", texts_of[stem], (folders[a][stem][0], folders[b][stem][0]), (a, b))
        for (a, b), shared in common.items()
        for stem in shared
    ]


def read_pictures(folder: Path, settings: PreferenceDataConfig) -> dict[str, Picture]:
    """List the images of a folder by their relative path without suffix, in natural order."""
    within = None if settings.allow_outside else (folder,)
    entries = listed(folder)
    pictures, listing = pictures_below(folder)
    if notes := listing.notes(folder):
        print(bounded("\n".join(notes)))
    texts: dict[Path, Prompt] = {}
    if entries is not None:
        for row in Table(printable(entries.paths[0]), entries, folder, within=within).rows():
            texts[folder / str(row.values.get("file_name"))] = row.prompt()
    found: dict[str, Picture] = {}
    for path in pictures:
        text = None if entries is not None else caption(path.with_suffix(".txt"), None if within is None else folder)
        prompt = texts.get(path) if text is None else Prompt(text)
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{shorten(folder)} has two images called {shorten(stem)}: rename one")
        found[stem] = (ImageSource(printable(path), path, within=within), prompt)
    return found


def _prompts(stems: Sequence[str], folders: Sequence[dict[str, Picture]], file: Path | None) -> dict[str, Prompt]:
    if file is not None:
        given = load_prompts(file)
        if len(given) not in (1, len(stems)):
            raise ValueError(f"{len(given)} prompts for {len(stems)} file names: give one for each, or one for all")
        return dict(zip(stems, given if len(given) > 1 else given * len(stems), strict=True))
    found = {stem: next(_own(stem, folders), None) for stem in stems}
    if lacking := [stem for stem, prompt in found.items() if prompt is None]:
        raise ValueError(
            f"{len(lacking)} images have no prompt, such as {some(lacking)}: write --prompts FILE, a metadata.jsonl "
            "with file_name and prompt, or NAME.txt beside each image"
        )
    return {stem: prompt for stem, prompt in found.items() if prompt is not None}


def _own(stem: str, folders: Sequence[dict[str, Picture]]) -> Iterator[Prompt]:
    return (prompt for pictures in folders for prompt in [pictures.get(stem, (None, None))[1]] if prompt is not None)
