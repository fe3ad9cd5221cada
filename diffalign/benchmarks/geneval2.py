"""GenEval 2 (arXiv 2512.16853): Soft-TIFA over the atoms of 800 prompts with three to ten of them.

Protocol of facebookresearch/GenEval2@a6e82d2: one image per prompt; a vision-language model is asked "{question} Answer
in one word." about every atom, and the score of an atom is the probability of the expected answer. The arithmetic mean
over the atoms of a prompt (AM) estimates atoms, the geometric mean (GM) whole prompts; both are averaged over prompts.

Departure: the judge gives the probability of "Yes" against "No", so an atom whose answer is another word, such as
"four", is asked as a question whether that is the answer; the authors sum over spellings of the word itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffalign.benchmarks.protocol import Figures, Judge, Judged, Protocol, by, mean, register_benchmark
from diffalign.structures import Prompt

QUESTION = "{} Answer in one word."
WHETHER = 'The question is: {question} Is "{answer}" the right answer?'


def atoms(prompt: Prompt) -> list[Prompt]:
    """Return a question with the answer yes for every atom, and the atom itself for judges that read ``vqa_list``."""
    asked = []
    for question, answer in prompt.metadata["vqa_list"]:
        plain = str(answer).strip().lower() == "yes"
        text = question if plain else WHETHER.format(question=question, answer=answer)
        asked.append(Prompt(text, {"vqa_list": [[question, answer]], "questions": [text]}))
    return asked


PROTOCOL = Protocol(
    title="GenEval 2",
    source="arXiv 2512.16853, facebookresearch/GenEval2@a6e82d2",
    size=800,
    images_per_prompt=1,
    judges={
        "vqa": Judge(
            "vqascore_qwen3",
            {"question": QUESTION, "answer": "yes_no"},
            atoms,
            "Qwen3-VL-8B, probability of the expected word over its spellings",
        )
    },
    prompts=None,
    where="geneval2_data.jsonl of github.com/facebookresearch/GenEval2 is CC BY-NC 4.0 and not part of this package; "
    "download it there",
    comparable="Close to published figures for atoms whose answer is yes; atoms with another answer (numbers) are "
    "asked as yes-or-no questions, which is easier, so that AM and GM may be above the authors'.",
    headline="GM",
    needs=("vqa_list", "atom_count", "skills"),
    layout="{index:05d}.png",
)


def geometric(values: Sequence[float]) -> float:
    """Return the geometric mean; 0 if a value is 0, NaN if one is."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if min(values) <= 0 else math.exp(sum(map(math.log, values)) / len(values))


@register_benchmark("geneval2", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return GM and AM over all prompts, GM by number of atoms, and the mean score of atoms by skill."""
    scored = {id(one): list(one.answers["vqa"]) for one in judged}
    prompt_level = {key: geometric(values) for key, values in scored.items()}
    found = {
        "GM": mean(prompt_level.values()),
        "AM": mean(sum(values) / len(values) for values in scored.values()),
    }
    for count, own in sorted(by(judged, "atom_count").items(), key=lambda item: int(item[0])):
        found[f"GM, {count} atoms"] = mean(prompt_level[id(one)] for one in own)
    skills: dict[str, list[float]] = {}
    for one in judged:
        for skill, value in zip(one.prompt.metadata["skills"], scored[id(one)], strict=True):
            skills.setdefault(skill, []).append(value)
    return found | {f"AM, {skill}": mean(values) for skill, values in skills.items()}
