"""Prompts with skills, and VQAScore by skill, as GenAI-Bench and GenAI-Rank share them (arXiv 2406.13743)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from diffalign.benchmarks.protocol import Figures, Judge, Judged, mean
from diffalign.data.prompts import load_prompts
from diffalign.files import read_text, shorten
from diffalign.structures import Prompt

JUDGES = {"vqascore": Judge("vqascore")}
WHERE = "the prompts come from the hub ({}); a folder with {} and genai_skills.json works too"
COMPARABLE = "Comparable with published figures of CLIP-FlanT5-XXL (vqascore), not with those of another judge."
SKILLS = "genai_skills.json"
BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal", "advanced")


def read(source: str, file: str) -> list[Prompt]:
    """Read ``file`` and genai_skills.json of a folder or a hub data set, or any prompts with a list of "skills"."""
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet", ".csv"):
        return load_prompts(source)
    where = {name: path / name if path.is_dir() else _download(source, name) for name in (file, SKILLS)}
    try:
        items, skills = (json.loads(read_text(where[name])) for name in (file, SKILLS))
        names: dict[int, list[str]] = {}
        for skill, numbers in skills.items():
            for number in numbers:
                names.setdefault(int(number), []).append(skill)
        return [
            Prompt(str(item["prompt"]), {"id": key, "skills": names.get(int(key), [])}) for key, item in items.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{shorten(where[file])} and {SKILLS} do not belong together: {error!r}") from error


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (OSError, ValueError) as error:  # also of the hub's client
        problem = f"{name} of {shorten(repository)} cannot be read: {shorten(error, 300)}"
        raise ValueError(f"{problem}; download it, or name a folder that holds it as --prompts") from error


def by_skill(judged: Sequence[Judged], of_prompt: Callable[[list[float]], float]) -> Figures:
    """Reduce the answers about each prompt's images to a number; return its mean over all prompts, and by skill."""
    prompts: dict[int, list[float]] = {}
    skills: dict[int, Sequence[str]] = {}
    for one in sorted(judged, key=lambda one: (one.index, one.sample)):
        prompts.setdefault(one.index, []).append(one.answer("vqascore"))
        skills[one.index] = one.prompt.metadata["skills"]
    scores = {index: of_prompt(values) for index, values in prompts.items()}
    found = {"all": mean(scores[index] for index, own in skills.items() if own)}
    known = {skill for own in skills.values() for skill in own}
    order = [name for name in ("basic", "advanced", *BASIC[:-1], *ADVANCED[:-1]) if name in known]
    return found | {name: mean(scores[index] for index, own in skills.items() if name in own) for name in order}
