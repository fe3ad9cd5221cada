"""``diffalign check`` for prompt files: faults and oddities by file and line."""

from __future__ import annotations

import codecs
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.prompt_source import PromptSource
from diffalign.data.prompts import LINE_ERRORS, LineError, prompt_source, read_entries
from diffalign.data.validation import EXAMPLES
from diffalign.files import open_regular, raw_lines, shorten, some
from diffalign.models.prompt_length import Encoder, cut
from diffalign.structures import Input, Prompt

MAX_WORDS = 1024  # token limit of the longest text encoder; a word has at least one token
ODD = {
    "repeated": "the same prompt again; each copy is sampled",
    "long": "more tokens than a text encoder reads, the rest is truncated; --model MODEL counts with its tokenizers",
    "control": "invisible characters: control characters or text direction marks",
}
LINES = (".txt", ".jsonl", ".csv")  # read line by line
NO_LAYOUT = {"byte_order_mark": False, "line_ends": None}
INVISIBLE = ("Cc", "Cf")  # Unicode categories
JOINERS = "\u200c\u200d"  # used within words of some scripts and within emoji
TAGS = range(0xE0020, 0xE0080)  # used within flag emoji


def too_long(text: str, encoders: Sequence[Encoder] | None) -> str | None:
    """Describe by how much a prompt exceeds the limit of a text encoder; None if it fits.

    Without encoders, the number of words (a lower bound of tokens) is compared with the largest limit.
    """
    if encoders is not None:
        return cut(text, encoders)
    words = len(text.split())
    return f"{words:,} words, and no text encoder reads more than {MAX_WORDS:,} tokens" if words > MAX_WORDS else None


def examine_prompts(sources: Sequence[str | Path], encoders: Sequence[Encoder] | None = None) -> dict[str, Any]:
    """Read prompts and return the report that ``prompts_text`` formats.

    Args:
        sources: Files, hub ids, or sets by one word, with options.
        encoders: Text encoders of the model; None if unknown.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is of another kind.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*LINE_ERRORS, *ODD)}
    seen: dict[Input, str] = {}
    files = [_examine_source(prompt_source(source), found, seen, encoders) for source in sources]
    faults = {kind: {"count": len(lines), "samples": lines} for kind, lines in found.items()}
    stops = [f"{shorten(file['path'])} has no prompts: write one per line" for file in files if not file["prompts"]]
    stops = [lines[0] for kind, lines in found.items() if kind in LINE_ERRORS and lines] + stops
    return {"files": files, "different": len(seen), "faults": faults, "verdict": stops}


def _examine_source(
    source: PromptSource, found: dict[str, list[str]], seen: dict[Input, str], encoders: Sequence[Encoder] | None
) -> dict[str, Any]:
    """Summarize a source; add faults of its lines to ``found`` and its prompts to ``seen``."""
    counts: dict[str, int] = defaultdict(int)
    own = set[Input]()
    for where, line in read_entries(source):
        if counts["prompts"] == source.limit:
            break
        counts["blank"] += line is None
        if isinstance(line, LineError):
            found[line.kind].append(str(line))
        elif line is not None and not (source.unique and line.input in own):
            own.add(line.input)
            counts["prompts"] += 1
            for kind, detail in _odd(line, where, seen, encoders):
                found[kind].append(f"{where}: {detail}")
    layout = _layout(source.path) if source.path and source.path.suffix.lower() in LINES else NO_LAYOUT
    return {"path": source.text, "prompts": counts["prompts"], "blank": counts["blank"], **layout}


def _layout(path: Path) -> dict[str, Any]:
    """Detect byte order mark and line ends."""
    ends = {line[-2:] if line.endswith(b"\r\n") else line[-1:] for line in raw_lines(path)}
    with open_regular(path) as file:
        mark = file.read(3) == codecs.BOM_UTF8
    return {"byte_order_mark": mark, "line_ends": "CRLF" if b"\r\n" in ends else "CR" if b"\r" in ends else "LF"}


def _odd(
    prompt: Prompt, where: str, seen: dict[Input, str], encoders: Sequence[Encoder] | None
) -> list[tuple[str, str]]:
    """List (kind, detail) of oddities that training accepts; a repeated prompt is reported only as repeated."""
    text, oddities = prompt.text, []
    if (first := seen.setdefault(prompt.input, where)) != where:
        return [("repeated", f"{first} again")]
    if length := too_long(text, encoders):
        oddities.append(("long", f"{length}: {shorten(text, 60)}"))
    if hidden := sorted({f"U+{ord(letter):04X}" for letter in text if _is_invisible(letter)}):
        oddities.append(("control", some(hidden, 10)))
    return oddities


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) in INVISIBLE and letter not in JOINERS and ord(letter) not in TAGS


def prompts_text(report: dict[str, Any]) -> str:
    """Format the report as text."""
    total = sum(file["prompts"] for file in report["files"])
    lines = [f"{total} prompts, {report['different']} different"]
    for file in report["files"]:
        mark = ", a byte order mark" if file["byte_order_mark"] else ""
        counts = f"{file['prompts']} prompts, {file['blank']} blank lines"
        ends = f", line ends {file['line_ends']}" if file["line_ends"] else ""
        lines.append(f"{shorten(file['path'])}: {counts}{ends}{mark}")
    for kind, faults in report["faults"].items():
        meaning = LINE_ERRORS.get(kind) or ODD[kind]
        lines.append(f"{kind}: {faults['count']} ({meaning})")
        lines += [f"  {sample}" for sample in faults["samples"][:EXAMPLES]]
        if (rest := faults["count"] - EXAMPLES) > 0:
            lines.append(f"  ... and {rest} more")
    return "\n".join([*lines, *(f"a run would stop: {reason}" for reason in report["verdict"])])
