"""``diffalign check`` on files of prompts: what is wrong with them, or odd, by file and line."""

from __future__ import annotations

import codecs
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.prompts import FAULTS, LineFault, prompt_file, read_lines
from diffalign.data.quarantine import EXAMPLES
from diffalign.structures import Prompt

LONG = 1000  # characters; the longest text encoders in use read 512 tokens
ODD = {
    "repeated": "the same text again; it is drawn as often as it stands there",
    "long": f"more than {LONG:,} characters; text encoders cut the end",
    "control": "characters that no one sees: control characters, or ones that change the direction of text",
}
UNSEEN = ("Cc", "Cf")  # categories of Unicode
JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
TAGS = range(0xE0020, 0xE0080)  # within flags


def examine_prompts(sources: Sequence[str | Path]) -> dict[str, Any]:
    """Everything that is known after reading the files: what ``prompts_text`` prints.

    FileNotFoundError, ValueError: a file that is missing, or of another kind.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*FAULTS, *ODD)}
    seen: dict[str, str] = {}
    files = [_examine_file(prompt_file(source), found, seen) for source in sources]
    faults = {kind: {"count": len(lines), "samples": lines} for kind, lines in found.items()}
    stops = [f"{file['path']} holds no prompt: write one per line" for file in files if not file["prompts"]]
    stops = [lines[0] for kind, lines in found.items() if kind in FAULTS and lines] + stops
    return {"files": files, "different": len(seen), "faults": faults, "verdict": stops}


def _examine_file(path: Path, found: dict[str, list[str]], seen: dict[str, str]) -> dict[str, Any]:
    """What the file is as a whole; its lines' faults go into ``found``, its texts into ``seen``."""
    counts: dict[str, int] = defaultdict(int)
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}, line {number}"
        counts["blank"] += line is None
        if isinstance(line, LineFault):
            found[line.kind].append(str(line))
        elif line is not None:
            counts["prompts"] += 1
            for kind, detail in _odd(line, where, seen):
                found[kind].append(f"{where}: {detail}")
    content = path.read_bytes()
    return {
        "path": str(path),
        "prompts": counts["prompts"],
        "blank": counts["blank"],
        "byte_order_mark": content.startswith(codecs.BOM_UTF8),
        "line_ends": "CRLF" if b"\r\n" in content else "CR" if b"\r" in content else "LF",
    }


def _odd(prompt: Prompt, where: str, seen: dict[str, str]) -> list[tuple[str, str]]:
    """(kind, detail) of what a run takes as it is, but a person should know."""
    text, said = prompt.text, []
    if (first := seen.setdefault(text, where)) != where:
        said.append(("repeated", f"{first} again"))
    if len(text) > LONG:
        said.append(("long", f"{len(text):,} characters: {text[:40]}..."))
    if hidden := sorted({f"U+{ord(letter):04X}" for letter in text if _unseen(letter)}):
        said.append(("control", ", ".join(hidden)))
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
        lines.append(f"{file['path']}: {counts}, line ends {file['line_ends']}{mark}")
    for kind, faults in report["faults"].items():
        meaning = FAULTS.get(kind) or ODD[kind]
        lines.append(f"{kind}: {faults['count']} ({meaning})")
        lines += [f"  {sample}" for sample in faults["samples"][:EXAMPLES]]
        if (rest := faults["count"] - EXAMPLES) > 0:
            lines.append(f"  ... and {rest} more")
    return "\n".join([*lines, *(f"a run would stop: {reason}" for reason in report["verdict"])])
