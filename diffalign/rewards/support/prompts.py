"""Deduplicate prompts, check question templates, and escape special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any


def unique_prompts(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct prompts, and the index of each of ``prompts`` among them."""
    indices = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(indices), [indices[prompt] for prompt in prompts]


@cache
def published_template(name: str) -> str:
    """Read a template of the folder ``templates``, see its README."""
    return (Path(__file__).parents[1] / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def fill(template: str, prompt: str) -> str:
    """Insert a prompt for ``{prompt}``; other braces, of template and prompt, stay as they are."""
    return template.replace("{prompt}", prompt)


def check_question(name: str, question: str) -> None:
    """Raise ValueError unless the question of reward ``name`` contains exactly one ``{}``."""
    if question.count("{}") != 1:
        raise ValueError(f"reward {name!r}: the question needs one {{}} for the prompt, got {question!r}")
    check_template(name, question, {""})


def check_template(name: str, template: str, fields: Set[str]) -> None:
    """Check that a template from a configuration contains only plain replacement fields in ``fields``.

    Raises ValueError for other fields, attribute or item access (``{prompt.x}``), conversions, and format
    specifications (``{prompt:>99}``).
    """
    allowed = ", ".join(f"{{{field}}}" for field in sorted(fields))
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"reward {name!r}: question {template[:200]!r}: {error}; double the braces of text") from error
    for _, field, form, conversion in parts:
        if field is not None and (field not in fields or form or conversion):
            raise ValueError(
                f"reward {name!r}: question {template[:200]!r} may hold {allowed} and nothing else in braces; "
                "double the braces of text"
            )


def escape_special_tokens(tokenizer: Any, prompt: str) -> str:
    """Insert a space into every special token of the tokenizer that occurs in ``prompt``.

    Otherwise a prompt with ``<|image_pad|>`` would insert a second image.
    """
    tokens = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)
    pattern = "|".join(map(re.escape, tokens))
    return re.sub(pattern, lambda match: f"{match[0][0]} {match[0][1:]}", prompt) if tokens else prompt
