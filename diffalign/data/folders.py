"""List folders of pairs as rows, and the image files of any folder.

Two sides, with files of the same stem, and texts in ``STEM.txt`` beside the chosen image or in ``metadata.jsonl`` (or
``metadata.csv``: "file_name", relative to the folder or to its side, and "prompt", "caption" or "text"):

    FOLDER/chosen/001.png  FOLDER/rejected/001.jpg  FOLDER/chosen/001.txt

The sides may also be called winner and loser, win and lose, or w and l. Or a folder for each pair:

    FOLDER/001/winner.png  FOLDER/001/loser.png  FOLDER/001/prompt.txt

Names are in natural order (2 before 10). Files of operating systems and editors are ignored; the notes list them and
all other files that are not read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.records import Records
from diffalign.data.row import PROMPTS, as_text
from diffalign.files import check_inside, natural, printable, read_text, shorten, some
from diffalign.media import SUFFIXES, UNREADABLE_SUFFIXES

SIDES = (("chosen", "rejected"), ("winner", "loser"), ("win", "lose"), ("w", "l"))
LISTS = ("metadata.jsonl", "metadata.csv")  # beside the pictures that they describe
LABELS = ".labels"  # AI labels; hidden, so that no loader reads its files as data
# Names of operating systems, editors and archives, besides all that begin with a dot.
CLUTTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"})


@dataclass
class Listing:
    """Files of a folder that are not read, as relative paths.

    Attributes:
        hidden: Clutter, see ``is_clutter``.
        strange: Files and folders of other kinds.
        unlisted: Images without a line in the metadata.
    """

    hidden: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    def notes(self, folder: Path) -> list[str]:
        """Format a line per kind of file that is not read."""
        kinds = {
            "hidden or system files": self.hidden,
            "files or folders of other kinds": self.strange,
            "pictures without a line in the metadata": self.unlisted,
        }
        where = shorten(folder)
        return [f"{where}: {len(names)} {kind} not read: {some(names)}" for kind, names in kinds.items() if names]


def is_clutter(name: str) -> bool:
    """Return whether a name is that of a hidden file, or of a file of the operating system or an editor."""
    return name.startswith(".") or name.lower() in CLUTTER


def is_picture(path: Path) -> bool:
    """Return whether the suffix is that of an image format, including formats that cannot be decoded."""
    return path.suffix.lower() in SUFFIXES | UNREADABLE_SUFFIXES


def visible(folder: Path, listing: Listing, below: Path | None = None) -> list[Path]:
    """List a folder in natural order; clutter is added to ``listing``, by its path relative to ``below``."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
        if path.name == LABELS:
            continue
        if is_clutter(path.name):
            listing.hidden.append(str(path.relative_to(below or folder)))
        else:
            found.append(path)
    return found


def pictures_below(folder: Path) -> tuple[list[Path], Listing]:
    """List every image below a folder in natural order. ``STEM.txt`` beside an image is not strange."""
    listing, found, captions = Listing(), [], []

    def walk(current: Path) -> None:
        for path in visible(current, listing, folder):
            if path.is_dir():
                if not path.is_symlink():  # a link to a parent folder would never end
                    walk(path)
                else:
                    listing.strange.append(str(path.relative_to(folder)))
            elif is_picture(path):
                found.append(path)
            elif path.name not in LISTS:
                captions.append(path)

    walk(folder)
    stems = {path.with_suffix("") for path in found}
    strange = [path for path in captions if path.suffix.lower() != ".txt" or path.with_suffix("") not in stems]
    listing.strange += [str(path.relative_to(folder)) for path in strange]
    return found, listing


def by_stem(pictures: Iterable[Path]) -> dict[str, Path]:
    """Index images by stem in Unicode form NFC. Raises ValueError if two images share a stem."""
    found: dict[str, Path] = {}
    for path in pictures:
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in found:
            both = f"{shorten(found[stem])} and {shorten(path.name)}"
            raise ValueError(f"{both} have the same name but for the suffix: rename or remove one of them")
        found[stem] = path
    return found


def listed(folder: Path) -> Records | None:
    """Read ``metadata.jsonl`` or ``metadata.csv`` of a folder; None without one. Raises ValueError if it has both."""
    there = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"{shorten(folder)} has {' and '.join(LISTS)}: remove the one that does not count")
    return Records(there) if there else None


def folder_rows(folder: Path, anywhere: bool = False) -> tuple[list[dict[str, Any]], list[str]] | None:
    """List the pairs of a folder.

    Args:
        folder: The folder.
        anywhere: Whether captions may be links to files outside the folder.

    Returns:
        Rows with "name", "chosen", "rejected", "prompt" and "metadata", and notes; None if the folder has neither
        layout. Paths are relative to the folder. An image without a partner is a row with None on the other side.

    Raises:
        ValueError: Two images share a stem, both layouts at once, or a caption that is not UTF-8.
    """
    listing = Listing()
    there = visible(folder, listing)
    names = {path.name for path in there if path.is_dir()}
    sides = [pair for pair in SIDES if set(pair) <= names]
    if len(sides) > 1:
        both = " and ".join("/".join(pair) for pair in sides)
        raise ValueError(f"{shorten(folder)} has the sides {both}: move one pair of folders elsewhere")
    if sides:
        others = [path for path in there if path.name not in (*sides[0], *LISTS)]
        listing.strange += [path.name for path in others]
        chosen, rejected = (folder / name for name in sides[0])
        rows = _two_sides(folder, chosen, rejected, listing, anywhere)
        return rows, listing.notes(folder)
    found = [(path, _one_pair(path, listing, anywhere)) for path in there if path.is_dir()]
    if not any(row for _, row in found):
        return None
    listing.strange += [path.name for path, row in found if not row]
    listing.strange += [path.name for path in there if not path.is_dir()]
    return [row for _, row in found if row], listing.notes(folder)


def _two_sides(folder: Path, chosen: Path, rejected: Path, listing: Listing, anywhere: bool) -> list[dict[str, Any]]:
    entries = _listed(folder)
    files = [visible(side, listing, folder) for side in (chosen, rejected)]
    sides = [by_stem(path for path in side if is_picture(path) and not path.is_dir()) for side in files]
    rows, used = [], set()
    for stem in sorted({*sides[0], *sides[1]}, key=natural):
        pair = [side.get(stem) for side in sides]
        names = [name for file in pair if file for name in _names(folder, file)]
        entry = next((entries[name] for name in names if name in entries), {})
        used.update(names)
        beside = pair[0] or pair[1]
        within = None if anywhere else folder
        text = (caption(chosen / f"{beside.stem}.txt", within) if beside else None) or _first(entry)
        rows.append(_row(folder, stem, pair, text, entry.get("metadata")))
    captions = {path.stem for path in sides[0].values()} | {path.stem for path in sides[1].values()}
    listing.strange += [
        str(path.relative_to(folder))
        for side in files
        for path in side
        if not is_picture(path) and not (path.suffix == ".txt" and path.parent == chosen and path.stem in captions)
    ]
    listing.strange += [f"{name} (in the metadata)" for name in entries if name not in used]
    return rows


def _names(folder: Path, file: Path) -> Iterator[str]:
    for name in (file.relative_to(folder).as_posix(), file.name):
        yield unicodedata.normalize("NFC", name)


def _listed(folder: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for entry in listed(folder) or ():
        name = unicodedata.normalize("NFC", str(entry.get("file_name")))
        if name in found:
            raise ValueError(f"{shorten(folder)}: its metadata have two lines for {shorten(name)}: remove one of them")
        found[name] = entry
    return found


def _first(entry: Mapping[str, Any]) -> Any:
    return next((entry[key] for key in PROMPTS if entry.get(key) is not None), None)


def _one_pair(folder: Path, listing: Listing, anywhere: bool) -> dict[str, Any] | None:
    own = Listing()
    there = visible(folder, own, folder.parent)
    files = by_stem(path for path in there if is_picture(path) and not path.is_dir())
    names = next((names for names in SIDES if set(names) & set(files)), None)
    if names is None:
        return None
    read = {*(files[name] for name in names if name in files), folder / "prompt.txt"}
    listing.hidden += own.hidden
    listing.strange += [str(path.relative_to(folder.parent)) for path in there if path not in read]
    text = caption(folder / "prompt.txt", None if anywhere else folder.parent)
    return _row(folder.parent, folder.name, [files.get(name) for name in names], text, None)


def _row(folder: Path, name: str, files: Sequence[Path | None], text: Any, metadata: Any) -> dict[str, Any]:
    chosen, rejected = (file and file.relative_to(folder) for file in files)
    return {"name": printable(Path(name)), "chosen": chosen, "rejected": rejected, "prompt": text, "metadata": metadata}


def caption(path: Path, within: Path | None) -> str | None:
    """Read a caption file; None if there is no regular file. within: the folder that must contain it, if any.

    Raises ValueError for bytes that are not UTF-8, a text that is too long, or a link that leads outside.
    """
    if not path.is_file():
        return None
    try:
        if within is not None:
            check_inside(path, (within,))
        return as_text(read_text(path))
    except ValueError as error:
        named = str(error) if str(error).startswith(shorten(path)) else f"{shorten(path)}: {error}"
        raise ValueError(named) from error
