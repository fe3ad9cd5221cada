"""Yes-or-no questions about an image, where a question counts only if those that it depends on were answered yes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diffalign.benchmarks.protocol import Judge
from diffalign.structures import Prompt

YES = 0.5  # probability of yes, against no, from which an answer counts as yes
QUESTION = "{} Please answer Yes or No."


def questions(prompt: Prompt) -> list[Prompt]:
    """Return the questions in the metadata of a prompt; each is also its own metadata, for a judge behind a server."""
    return [Prompt(text, {"questions": [text]}) for text in prompt.metadata["questions"]]


def yes_or_no(published: str, reward: str = "vqascore_qwen2.5") -> Judge:
    """Return a judge of the questions in the metadata: P(yes) against P(no) for the first token of the answer."""
    return Judge(reward, {"question": QUESTION, "answer": "yes_no"}, questions, published)


def said_yes(probability: float) -> float:
    """Return 1 for a yes, 0 for a no, and NaN without an answer."""
    return math.nan if math.isnan(probability) else float(probability >= YES)


def graph_score(answers: Sequence[float], parents: Sequence[Sequence[int]], in_order: bool) -> float:
    """Return the share of questions answered yes whose parents were too.

    Args:
        answers: 1 or 0 per question.
        parents: Numbers, from 1, of the questions that each one depends on; 0 and unknown numbers mean none.
        in_order: Whether a question that was set to 0 sets later ones to 0 in turn, in the order given (DPG-Bench);
            otherwise only the answers themselves count (OneIG-Bench).
    """
    found = list(answers)
    for number, above in enumerate(parents):
        known = found if in_order else answers
        if any(1 <= parent <= len(known) and known[parent - 1] == 0 for parent in above):
            found[number] = 0.0
    return sum(found) / len(found)


def read_parents(metadata: Mapping[str, object]) -> list[list[int]]:
    """Return the parents of each question."""
    listed = metadata["parents"]
    assert isinstance(listed, Sequence)
    return [list(parents) for parents in listed]
