"""``diffalign check`` on files of prompts: what is wrong with them, or odd, by file and line."""

from __future__ import annotations

import codecs
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.prompts import LINE_ERRORS, LineError, prompt_file, read_lines
from diffalign.data.validation import EXAMPLES
from diffalign.files import open_regular, raw_lines, shorten, some
from diffalign.models.prompt_length import Encoder, cut
from diffalign.structures import Prompt

WORDS = 1024  # tokens that the longest text encoder in use reads; a word is one or more
ODD = {
    "repeated": "the same text again; it is drawn as often as it stands there",
    "long": "more tokens than a text encoder reads, which cuts the end; --model MODEL counts the tokens of a model",
    "control": "characters that no one sees: control characters, or ones that change the direction of text",
}
UNSEEN = ("Cc", "Cf")  # categories of Unicode
JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
TAGS = range(0xE0020, 0xE0080)  # within flags


def too_long(text: str, encoders: Sequence[Encoder] | None) -> str | None:
    """Say how much longer a text is than what the encoders read; None where it is not.

    Without encoders, only what no encoder reads: words are a lower bound of tokens.
    """
    if encoders is not None:
        return cut(text, encoders)
    words = len(text.split())
    return f"{words:,} words, and no text encoder reads more than {WORDS:,} tokens" if words > WORDS else None


def examine_prompts(sources: Sequence[str | Path], encoders: Sequence[Encoder] | None = None) -> dict[str, Any]:
    """Everything that is known after reading the files: what ``prompts_text`` prints.

    encoders: of the model that is to read the prompts; None: not known.
    FileNotFoundError, ValueError: a file that is missing, or of another kind.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*LINE_ERRORS, *ODD)}
    seen: dict[str, str] = {}
    files = [_examine_file(prompt_file(source), found, seen, encoders) for source in sources]
    faults = {kind: {"count": len(lines), "samples": lines} for kind, lines in found.items()}
    stops = [f"{shorten(file['path'])} holds no prompt: write one per line" for file in files if not file["prompts"]]
    stops = [lines[0] for kind, lines in found.items() if kind in LINE_ERRORS and lines] + stops
    return {"files": files, "different": len(seen), "faults": faults, "verdict": stops}


def _examine_file(
    path: Path, found: dict[str, list[str]], seen: dict[str, str], encoders: Sequence[Encoder] | None
) -> dict[str, Any]:
    """What the file is as a whole; its lines' faults go into ``found``, its texts into ``seen``."""
    counts: dict[str, int] = defaultdict(int)
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{shorten(path)}, line {number}"
        counts["blank"] += line is None
        if isinstance(line, LineError):
            found[line.kind].append(str(line))
        elif line is not None:
            counts["prompts"] += 1
            for kind, detail in _odd(line, where, seen, encoders):
                found[kind].append(f"{where}: {detail}")
    return {"path": str(path), "prompts": counts["prompts"], "blank": counts["blank"], **_layout(path)}


def _layout(path: Path) -> dict[str, Any]:
    """Its byte order mark, and the ends of its lines."""
    ends = {line[-2:] if line.endswith(b"\r\n") else line[-1:] for line in raw_lines(path)}
    with open_regular(path) as file:
        mark = file.read(3) == codecs.BOM_UTF8
    return {"byte_order_mark": mark, "line_ends": "CRLF" if b"\r\n" in ends else "CR" if b"\r" in ends else "LF"}


def _odd(prompt: Prompt, where: str, seen: dict[str, str], encoders: Sequence[Encoder] | None) -> list[tuple[str, str]]:
    """(kind, detail) of what a run takes as it is, but a person should know. Of a repeated text, that it is one."""
    text, said = prompt.text, []
    if (first := seen.setdefault(text, where)) != where:
        return [("repeated", f"{first} again")]
    if length := too_long(text, encoders):
        said.append(("long", f"{length}: {shorten(text, 60)}"))
    if hidden := sorted({f"U+{ord(letter):04X}" for letter in text if _unseen(letter)}):
        said.append(("control", some(hidden, 10)))
    return said


def _unseen(letter: str) -> bool:
    return unicodedata.category(letter) in UNSEEN and letter not in JOINERS and ord(letter) not in TAGS


def prompts_text(report: dict[str, Any]) -> str:
    """The report for people."""
    total = sum(file["prompts"] for file in report["files"])
    lines = [f"{total} prompts, {report['different']} different"]
    for file in report["files"]:
        mark = ", a byte order mark" if file["byte_order_mark"] else ""
        counts = f"{file['prompts']} prompts, {file['blank']} blank lines"
        lines.append(f"{shorten(file['path'])}: {counts}, line ends {file['line_ends']}{mark}")
    for kind, faults in report["faults"].items():
        meaning = LINE_ERRORS.get(kind) or ODD[kind]
        lines.append(f"{kind}: {faults['count']} ({meaning})")
        lines += [f"  {sample}" for sample in faults["samples"][:EXAMPLES]]
        if (rest := faults["count"] - EXAMPLES) > 0:
            lines.append(f"  ... and {rest} more")
    return "\n".join([*lines, *(f"a run would stop: {reason}" for reason in report["verdict"])])
