"""The wrong captions that the builders train with."""

import importlib
import random
from pathlib import Path

from diffalign.shapes.captions import is_novel

ROOT = Path(__file__).parents[3]


def test_a_wrong_caption_is_wrong_in_one_word_and_names_nothing_held_out(monkeypatch):
    build = importlib.import_module("scripts.build.shapes_training")
    rng = random.Random(0)
    prompts = [build.caption(rng, tag, plain=1.0) for tag in build.TAGS for _ in range(40)]
    for prompt in prompts:
        for other in build.neighbours(prompt.metadata):
            assert not is_novel(other)
            words, others = (text.replace(" of", "").split() for text in (prompt.text, build.phrase(other)))
            assert sum(a != b for a, b in zip(words, others, strict=True)) == 1
    wrong = [build.wording(prompt.metadata, 1.0, rng) for prompt in prompts]
    assert not any(text.endswith(prompt.text) for text, prompt in zip(wrong, prompts, strict=True) if text)
    right = [build.wording(prompt.metadata, 0.0, rng) for prompt in prompts]
    assert all(text.endswith(prompt.text) for text, prompt in zip(right, prompts, strict=True) if text)
    assert 0.02 < sum(not text for text in right) / len(right) < 0.2
