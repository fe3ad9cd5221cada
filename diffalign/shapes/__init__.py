"""The embedded world: coloured shapes, captions in GenEval's task types, and an exact verifier that reads pixels."""

from diffalign.shapes.captions import TAGS, caption, disjoint_prompt_set, prompt_set
from diffalign.shapes.render import render
from diffalign.shapes.scene import Object, scene_for
from diffalign.shapes.verifier import Verdict, judge, judge_batch

__all__ = [
    "TAGS",
    "Object",
    "Verdict",
    "caption",
    "disjoint_prompt_set",
    "judge",
    "judge_batch",
    "prompt_set",
    "render",
    "scene_for",
]
