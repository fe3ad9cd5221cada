"""Name prompts by a file, a data set on the hub, or one word, with options after a question mark.

``prompts.csv?column=caption``, ``s3://bucket/prompts.jsonl?limit=500``,
``owner/name?split=test&metadata=category&limit=500``, ``geneval?split=test``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.files import shorten
from diffalign.remote import address, mapped, shown

TEXT, TABLE, HUB, GENERATED = "text file", "table", "hub data set", "generated set"
SUFFIXES = {".txt": TEXT, ".jsonl": TABLE, ".csv": TABLE, ".parquet": TABLE, ".json": TABLE}
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
READ = {
    TEXT: ("limit", "unique"),
    TABLE: ("column", "metadata", "image", "limit", "unique"),
    HUB: ("split", "subset", "revision", "file", "column", "metadata", "image", "limit", "unique", "streaming"),
    GENERATED: ("split", "seed", "limit"),
}


@dataclass(frozen=True)
class Listed:
    """A set of prompts that is known by one word.

    Attributes:
        source: Where the prompts come from.
        licence: Their licence, as the source states it.
        splits: Split -> options of ``PromptSource``; a generated set has none but the names.
        size: Number of prompts of a split that is fixed.
    """

    source: str
    licence: str
    splits: dict[str, dict[str, Any]]
    size: int | None = None


PICKAPIC = {"file_split": "train", "column": "caption", "metadata": (), "unique": True}
STYLES = ("anime", "concept-art", "paintings", "photo")
OWN: dict[str, dict[str, Any]] = {"train": {}, "test": {}}
LISTED = {
    "geneval": Listed("generated in GenEval's format (arXiv 2310.11513), all six tasks, without its 553", "own", OWN),
    "counting": Listed("generated: two to six objects of a class, scored by geneval", "own", OWN),
    "spatial": Listed("generated: two objects and their relation, scored by geneval", "own", OWN),
    "ocr": Listed("generated: words in quotes, scored by ocr", "own", OWN),
    "animals": Listed("generated: DDPO's 45 animals (arXiv 2305.13301), alone and doing something", "own", OWN),
    "pickapic": Listed(
        "CarperAI/pickapic_v1_no_images_training_sfw",
        "MIT",
        {"train": {**PICKAPIC, "held_out": False}, "test": {**PICKAPIC, "held_out": True}},
    ),
    "hpdv2": Listed(
        "ymhao/HPDv2",
        "Apache-2.0",
        {"train": {"files": ("train.json",), "column": "prompt", "metadata": (), "unique": True}},
    ),
    "hpdv2_benchmark": Listed(
        "zhwang/HPDv2",
        "Apache-2.0",
        {"test": {"files": tuple(f"benchmark/{style}.json" for style in STYLES), "metadata": ()}},
        3200,
    ),
    "parti": Listed(
        "nateraw/parti-prompts",
        "Apache-2.0",
        {"test": {"file_split": "train", "column": "Prompt", "metadata": ("Category", "Challenge")}},
        1632,
    ),
    "drawbench": Listed(
        "sayakpaul/drawbench",
        "Apache-2.0",
        {"test": {"file_split": "train", "column": "Prompts", "metadata": ("Category",)}},
        200,
    ),
    "open_image_preferences": Listed(
        "data-is-better-together/open-image-preferences-v1-binarized",
        "Apache-2.0",
        {"train": {"column": "prompt", "metadata": ("category",), "unique": True, "streaming": True}},
    ),
}


@dataclass(frozen=True)
class PromptSource:
    """Prompts to read.

    Attributes:
        text: The source as written, for messages.
        kind: Text file, table, hub data set or generated set.
        name: Path or address, hub id, or word of a generated set.
        split: Split of a hub data set; of a set known by a word, "train" or "test".
        subset: Configuration name of a hub data set.
        revision: Branch, tag or commit of a hub data set.
        files: Files of a hub data set to read, instead of all that belong to the split.
        column: Column of texts; None: the first of "prompt", "caption" and "text".
        metadata: Columns that become metadata; None: all others that hold no image.
        image: Column of source images, for models that edit; None: "image", if it holds the path of a file.
        limit: Largest number of prompts.
        seed: Seed of a generated set.
        unique: Whether a prompt that repeats is read once.
        streaming: Whether a hub data set is streamed, without a copy on disk.
        held_out: Keep the tenth of the prompts that is held out by a digest (True), or the rest; None keeps all.
        size: Number of prompts, where it is known.
    """

    text: str
    kind: str
    name: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    column: str | None = None
    metadata: tuple[str, ...] | None = None
    image: str | None = None
    limit: int | None = None
    seed: int = 0
    unique: bool = False
    streaming: bool = False
    held_out: bool | None = None
    size: int | None = None

    @property
    def count(self) -> int | None:
        """Number of prompts, as far as it is known without reading them: at most ``limit``."""
        known = [number for number in (self.limit, self.size) if number is not None]
        return min(known, default=None)

    @property
    def path(self) -> Path | None:
        """The local file, of an address its copy in the cache; None for other kinds."""
        return mapped(self.name) if self.kind in (TEXT, TABLE) else None


def parse_source(source: str | Path) -> PromptSource:
    """Split the name of prompts into what it names and its options.

    Raises:
        ValueError: An unknown suffix or word, an option that this kind of source does not read, or a bad value.
    """
    text = shown(source)
    if Path(text).exists() and Path(text).suffix.lower() in SUFFIXES:
        return PromptSource(text, SUFFIXES[Path(text).suffix.lower()], text)
    name, _, options = text.partition("?")
    if name in LISTED:
        return _listed(text, name, _options(text, options))
    suffix = Path(name).suffix.lower()
    if address(text) is not None and suffix in SUFFIXES:
        return _with(PromptSource(text, SUFFIXES[suffix], address(name) or name), _options(text, options))
    if suffix not in SUFFIXES and HUB_ID.fullmatch(name) and not Path(name).parent.is_dir():
        return _with(PromptSource(text, HUB, name), _options(text, options))
    if suffix not in SUFFIXES:
        raise ValueError(_unknown(name))
    return _with(PromptSource(text, SUFFIXES[suffix], name), _options(text, options))


def _unknown(name: str) -> str:
    suffix = Path(name).suffix
    if suffix:
        return f"{shorten(name)}: unknown suffix {shorten(suffix, 40)!r}; rename it to one of {', '.join(SUFFIXES)}"
    close = difflib.get_close_matches(name, LISTED, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"{shorten(name)} is no set of prompts: {hint}name a file ({', '.join(SUFFIXES)}), a hub id such as "
        f"owner/name, or one of {', '.join(LISTED)}"
    )


def _listed(text: str, name: str, options: dict[str, str]) -> PromptSource:
    """Return the source that a word stands for. Its splits say where they come from; only a few options are left."""
    found = LISTED[name]
    split = options.pop("split", next(iter(found.splits)))
    if split not in found.splits:
        raise ValueError(
            f"{shorten(text)}: {name} has no split {shorten(split, 40)!r}; write {' or '.join(found.splits)}"
        )
    if found.splits is OWN:
        return _with(PromptSource(text, GENERATED, name, split), options)
    settings = dict(found.splits[split])
    hub = PromptSource(text, HUB, found.source, settings.pop("file_split", split), size=found.size, **settings)
    return _with(hub, options, ("limit", "revision", "streaming"))


def _options(text: str, options: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, options.split("&")):
        key, equals, value = part.partition("=")
        if not equals or key in found:
            what = "is given twice" if equals else "has no value"
            raise ValueError(f"{shorten(text)}: {shorten(key, 40)} {what}; write {key[:40]}=VALUE once")
        found[key] = value
    return found


def _with(source: PromptSource, options: dict[str, str], known: tuple[str, ...] = ()) -> PromptSource:
    known = known or READ[source.kind]
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"{shorten(source.text)}: {shorten(key, 40)} is not read of a {source.kind}; write {', '.join(known)}"
            )
        values["files" if key == "file" else key] = _value(source, key, value)
    found = replace(source, **values)
    if found.files and any(key in options for key in ("split", "subset", "streaming")):
        raise ValueError(f"{shorten(source.text)}: file names what is read; leave out split, subset and streaming")
    return found


def _value(source: PromptSource, key: str, value: str) -> Any:
    if key in ("limit", "seed"):
        if not value.isdecimal() or (key == "limit" and not int(value)):
            raise ValueError(f"{shorten(source.text)}: {key} must be a whole number; write {key}=500")
        return int(value)
    if key in ("unique", "streaming"):
        if value not in ("true", "false"):
            raise ValueError(f"{shorten(source.text)}: {key} is true or false; write {key}=true")
        return value == "true"
    if key in ("metadata", "file"):
        return tuple(filter(None, value.split(",")))
    if not value:
        raise ValueError(f"{shorten(source.text)}: {key} is empty; fill it or leave it out")
    return value
