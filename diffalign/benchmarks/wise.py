"""WISE (arXiv 2503.07265): prompts that need world knowledge.

Protocol of PKU-YuanGroup/WISE@eb51174: 1000 prompts, one image each; six categories by prompt id (culture 1-400, time
401-567, space 568-700, biology 701-800, physics 801-900, chemistry 901-1000). WISE_Verified asks an open judge,
Qwen3.5-35B-A3B, for yes or no, and weights culture 0.40 and every other category 0.12. The older WiScore, rated by
GPT-4o, is another scale and never mixed with it.

Departure: the authors' question is not known here; the judge is asked whether the image shows what the explanation of
the prompt says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffalign.benchmarks.protocol import Figures, Judge, Judged, Protocol, by, mean, register_benchmark
from diffalign.benchmarks.questions import QUESTION, said_yes
from diffalign.data.prompts import load_prompts
from diffalign.files import read_text, shorten
from diffalign.structures import Prompt

WEIGHTS = {"culture": 0.40, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
LAST = {"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}
FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
TEMPLATE = 'The prompt was "{prompt}", which means: {explanation} Does this figure show that?'


def read(source: str) -> list[Prompt]:
    """Read a folder with the three files of the authors' ``data``, one such file, or a .jsonl file of prompts."""
    path = Path(source)
    if path.is_dir():
        if absent := [name for name in FILES if not (path / name).is_file()]:
            raise FileNotFoundError(f"{shorten(path)} has no {', '.join(absent)}: name the folder data of WISE")
        return [prompt for name in FILES for prompt in read(str(path / name))]
    if path.suffix != ".json":
        return load_prompts(source)
    try:
        return [_prompt(row) for row in json.loads(read_text(path))]
    except (KeyError, TypeError, ValueError) as error:
        wanted = 'a list of {"prompt_id", "Prompt", "Explanation"}'
        raise ValueError(f"{shorten(path)} is not {wanted} ({type(error).__name__}: {error})") from error


def _prompt(row: dict[str, str]) -> Prompt:
    number = int(row["prompt_id"])
    tag = next(name for name, last in LAST.items() if number <= last)
    return Prompt(row["Prompt"], {"id": number, "tag": tag, "explanation": row["Explanation"]})


def asks(prompt: Prompt) -> list[Prompt]:
    """Return the question about a prompt's explanation."""
    text = TEMPLATE.format(prompt=prompt.text, explanation=prompt.metadata["explanation"])
    return [Prompt(text, {"questions": [text]})]


PROTOCOL = Protocol(
    title="WISE",
    source="arXiv 2503.07265, PKU-YuanGroup/WISE@eb51174 (WISE_Verified)",
    size=1000,
    images_per_prompt=1,
    judges={
        "vqa": Judge("vqascore_qwen3", {"question": QUESTION, "answer": "yes_no"}, asks, "Qwen3.5-35B-A3B, yes or no")
    },
    prompts=None,
    where="the files of github.com/PKU-YuanGroup/WISE, folder data, are not part of this package; clone it and name "
    "the folder",
    comparable="Not comparable one to one: judge and question are ours (Qwen3-VL-8B instead of Qwen3.5-35B-A3B); the "
    "published figures are WISE_Verified, not the older WiScore of GPT-4o.",
    headline="overall",
    read=read,
    needs=("tag", "explanation"),
    layout="{id}.png",
)


@register_benchmark("wise", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the weighted mean of the categories, and each category's share of images with a yes."""
    categories = {tag: mean(said_yes(one.answer("vqa")) for one in own) for tag, own in by(judged, "tag").items()}
    total = sum(WEIGHTS[tag] for tag in categories)
    return {"overall": sum(WEIGHTS[tag] * value for tag, value in categories.items()) / total, **categories}
