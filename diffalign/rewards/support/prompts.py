"""What is done to the words of prompts before a model reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from string import Formatter
from typing import Any


def unique_prompts(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each prompt once, and where each of ``prompts`` is among them."""
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(places), [places[prompt] for prompt in prompts]


def check_question(name: str, question: str) -> None:
    """ValueError: the question of reward ``name`` has no place, or several, for the prompt."""
    if question.count("{}") != 1:
        raise ValueError(f"reward {name!r}: the question needs one {{}} for the prompt, got {question!r}")
    check_template(name, question, {""})


def check_template(name: str, template: str, fields: Set[str]) -> None:
    """Check that a text of a configuration has no other replacement fields than ``fields``, and nothing after them.

    ValueError: a field that reads attributes or items (``{prompt.x}``), or has a format or a width (``{prompt:>99}``).
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
    """``prompt`` with a blank inside whatever the tokenizer would take for one of its own marks.

    A prompt that writes ``<|image_pad|>`` would otherwise claim a second image.
    """
    marks = sorted((mark for mark in tokenizer.get_added_vocab() if len(mark) > 1), key=len, reverse=True)
    pattern = "|".join(map(re.escape, marks))
    return re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", prompt) if marks else prompt
