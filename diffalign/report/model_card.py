"""The README.md of a run folder, in the format of the Hub's model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml

from diffalign.atomic import write_text
from diffalign.report.markdown import inert, inline_code

REPOSITORY_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def literal(text: object) -> str:
    """Text as Python writes it, on one line between double quotes, whatever is in it."""
    return json.dumps(str(text), ensure_ascii=False)


@dataclass(frozen=True)
class ModelCard:
    """What a run did, and how to use what it made.

    base_model: a Hub id or a folder. trainer: e.g. "flow_grpo". command: the shell line that started the run.
    config_yaml: the resolved configuration. load_snippet: Python that loads the LoRA with diffusers.
    results: Markdown, such as the table of ``results.to_markdown``; empty for none.
    pictures: file names beside the card. tags: added to the default ones. lora: false for full weights.
    """

    title: str
    base_model: str
    trainer: str
    command: str
    config_yaml: str
    load_snippet: str
    results: str = ""
    pictures: Sequence[str] = ()
    tags: Sequence[str] = ()
    lora: bool = True


def write_model_card(path: str | Path, card: ModelCard) -> Path:
    """Writes ``card`` to ``path`` (a file, or a folder that gets a README.md) as UTF-8; returns the file."""
    path = Path(path)
    file = path / "README.md" if path.is_dir() else path
    what = "A LoRA" if card.lora else "A denoiser with all of its weights tuned,"
    sections = [
        f"# {inert(card.title)}",
        f"{what} for {inline_code(card.base_model)}, trained with diffalign ({card.trainer}).",
        "## Use",
        _fenced(card.load_snippet, "python"),
        *(["## Results", card.results] if card.results else []),
        *(f"![{inert(Path(name).stem)}]({quote(name)})" for name in card.pictures),
        "## Training",
        _fenced(card.command, "bash"),
        _fenced(card.config_yaml, "yaml"),
    ]
    write_text(file, _front_matter(card) + "\n" + "\n\n".join(sections) + "\n")
    return file


def _front_matter(card: ModelCard) -> str:
    fields: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    # The Hub refuses a card whose base model is a folder of the author's disk.
    if REPOSITORY_ID.fullmatch(card.base_model) and not Path(card.base_model).exists():
        fields["base_model"] = card.base_model
    kind = ["lora"] if card.lora else []
    fields["tags"] = list(dict.fromkeys([*kind, "text-to-image", "diffalign", card.trainer, *card.tags]))
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
