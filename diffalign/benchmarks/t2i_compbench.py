"""T2I-CompBench++ (arXiv 2307.06350): attributes, places, numbers and relations in eight categories.

Protocol of Karine-Huang/T2I-CompBench@1b70949: the 300 prompts of each *_val.txt, ten images each, fixed seeds.
Colour, shape and texture: the product over a prompt's noun phrases of P(yes) to "{phrase}?". 2D places and numbers: a
detector (see ``detection``). Non-spatial relations: CLIPScore. Complex: the mean of attributes, places and CLIPScore,
without places or CLIPScore where the authors' lists say that the prompt has none. All in percent.

Departures: 1. Qwen2.5-VL answers, not BLIP-VQA; 2. the detector is Mask2Former on COCO instead of UniDet; 3. noun
phrases are split at conjunctions, prepositions and forms of "to be" not by spaCy; 4. CLIPScore of complex prompts
keeps adjectives; 5. 3D places are a question to the same judge, where the authors use depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from diffalign.benchmarks.protocol import Figures, Judge, Judged, Protocol, by, mean, register_benchmark
from diffalign.data.prompts import load_prompts
from diffalign.files import shorten
from diffalign.structures import Prompt

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
ATTRIBUTES = ("color", "shape", "texture")
RELATIONS = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
SAME = {"boy": "person", "girl": "person", "man": "person", "woman": "person", "ship": "boat", "telivision": "tv",
        "television": "tv", "men": "person", "women": "person", "people": "person", "mice": "mouse",
        "knives": "knife", "painting": "picture"}  # fmt: skip
SPLIT = re.compile(
    r",|\b(?:and|with|is|was|are|were|on|in|at|of|under|above|below|behind|beside|near|next to|to|from|over|inside|"
    r"against|beneath|around|through|by)\b"
)
PHRASES = 8  # at most, as np_num of the authors


def read(source: str) -> list[Prompt]:
    """Read the *_val.txt files of the authors' examples/dataset, or a .jsonl file of prompts with a "tag"."""
    folder = Path(source)
    if not folder.is_dir():
        return [prepared(prompt) for prompt in load_prompts(source)]
    if absent := [name for name in CATEGORIES if not (folder / f"{name}_val.txt").is_file()]:
        raise FileNotFoundError(
            f"{shorten(folder)} has no {absent[0]}_val.txt: name the folder examples/dataset of T2I-CompBench"
        )
    kinds = {kind: _listed(folder / f"complex_val_{kind}.txt") for kind in ("spatial", "action")}
    found = []
    for tag in CATEGORIES:
        for prompt in load_prompts(folder / f"{tag}_val.txt"):
            kind = next((kind for kind, texts in kinds.items() if _plain(prompt.text) in texts), "")
            found.append(prepared(Prompt(prompt.text, {"tag": tag, "kind": kind})))
    return found


def _listed(path: Path) -> set[str]:
    return {_plain(prompt.text) for prompt in load_prompts(path)} if path.is_file() else set()


def _plain(text: str) -> str:
    return text.split(".")[0].lower()


def prepared(prompt: Prompt) -> Prompt:
    """Add what judges of the prompt's category read: phrases, objects and their relation, or counts."""
    tag, text = str(prompt.metadata.get("tag", "")), prompt.text.lower().rstrip(". ")
    if tag not in CATEGORIES:
        raise ValueError(f"{shorten(prompt.text, 60)!r} has the tag {tag!r}; write one of {', '.join(CATEGORIES)}")
    more: dict[str, object] = {}
    if tag in (*ATTRIBUTES, "complex"):
        more["phrases"] = phrases(text)
    if tag in ("spatial", "complex"):
        text = text.replace("on top of", "on the top of").replace("on bottom of", "on the bottom of")
        relation = next((one for one in RELATIONS if one in text), "")
        before, _, after = text.partition(relation or " and ")
        more |= {"objects": [noun(before), noun(after)], "relation": relation}
    if tag == "numeracy":
        more["counts"] = counts(text)
    return Prompt(prompt.text, {**more, **prompt.metadata})


def phrases(text: str) -> list[str]:
    """Split a prompt into noun phrases."""
    return [part.strip() for part in SPLIT.split(text) if re.search(r"[a-z]", part)][:PHRASES]


def noun(phrase: str) -> str:
    """Return the object of a phrase: the last word of its first part, in the singular."""
    part = next(iter(phrases(phrase)), "")
    words = re.findall(r"[a-z]+", part)
    return singular(words[-1]) if words else ""


def singular(word: str) -> str:
    """Return a noun in the singular, men and women as persons."""
    if word in SAME:
        return SAME[word]
    for ending, single in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us")):
            one = word.removesuffix(ending) + single
            return SAME.get(one, one)
    return word


def counts(text: str) -> dict[str, int]:
    """Return how many of each object a prompt asks for."""
    found: dict[str, int] = {}
    for part in SPLIT.split(text):
        words = re.findall(r"[a-z]+", part)
        if words and words[0] in NUMBERS and len(words) > 1:
            found[singular(words[-1])] = NUMBERS[words[0]]
    return found


def about_phrases(prompt: Prompt) -> list[Prompt]:
    """Ask for the phrases of attribute prompts, and for the whole of 3D places."""
    if prompt.metadata["tag"] == "3d_spatial":
        return [_question(prompt.text)]
    return [_question(phrase) for phrase in prompt.metadata.get("phrases", ())]


def _question(text: str) -> Prompt:
    return Prompt(text, {"questions": [f'Does this image show "{text}"?']})


def about_objects(prompt: Prompt) -> list[Prompt]:
    """Ask the detector about places and numbers."""
    asked = {key: prompt.metadata[key] for key in ("objects", "relation", "counts") if prompt.metadata.get(key)}
    return [Prompt(prompt.text, asked)] if "counts" in asked or "relation" in asked else []


def about_relations(prompt: Prompt) -> list[Prompt]:
    """Ask CLIP about non-spatial and complex prompts."""
    return [prompt] if prompt.metadata["tag"] in ("non_spatial", "complex") else []


PROTOCOL = Protocol(
    title="T2I-CompBench++",
    source="arXiv 2307.06350, Karine-Huang/T2I-CompBench@1b70949",
    size=2400,
    images_per_prompt=10,
    judges={
        "vqa": Judge("vqascore_qwen2.5", {"answer": "yes"}, about_phrases, "BLIP-VQA large"),
        "detector": Judge(
            "diffalign.benchmarks.detection:CompositionDetector", {}, about_objects, "UniDet (RS200, R50)"
        ),
        "clip": Judge("clipscore", {"path": "openai/clip-vit-base-patch32"}, about_relations),
    },
    prompts=None,
    where="the *_val.txt of github.com/Karine-Huang/T2I-CompBench, folder examples/dataset (MIT), are not part of this "
    "package; clone it and name that folder",
    comparable="Comparable for non_spatial only; the other categories use other judges than the authors' (Qwen2.5-VL "
    "for BLIP-VQA, Mask2Former for UniDet): compare models with each other, or score the images of --official_layout "
    "true with the authors' scripts.",
    headline="color",
    read=read,
    needs=("tag",),
    layout="{tag}/samples/{text}_{number:06d}.png",
)


def value(one: Judged) -> float:
    """Return the score of an image by the rule of its category."""
    tag, answers = one.prompt.metadata["tag"], one.answers
    attributes = math.prod(answers.get("vqa") or [math.nan])
    if tag in (*ATTRIBUTES, "3d_spatial"):
        return attributes
    if tag in ("spatial", "numeracy"):
        return one.answer("detector") if answers.get("detector") else 0.0
    if tag == "non_spatial":
        return one.answer("clip")
    places, relations = (one.answer("detector") if answers.get("detector") else 0.0), one.answer("clip")
    parts = {"spatial": (attributes, places), "action": (attributes, relations)}.get(
        one.prompt.metadata.get("kind", ""), (attributes, places, relations)
    )
    return sum(parts) / len(parts)


@register_benchmark("t2i_compbench", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean of every category, in percent."""
    return {tag: 100 * mean(value(one) for one in own) for tag, own in by(judged, "tag").items()}
