"""GenEval (arXiv 2310.11513): are the objects, their number, colours and places as asked?

Protocol of djghosh13/geneval@af4902f, evaluation/evaluate_images.py and summary_scores.py: 553 prompts in six tasks,
four images each; a task scores the share of its correct images, and the overall score is the mean of the tasks. The
thresholds (confidence 0.3, 0.9 for counting; 16 boxes; margin 0.1) are those of the reward ``geneval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.benchmarks.protocol import Figures, Judge, Judged, Protocol, by, mean, register_benchmark

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PROTOCOL = Protocol(
    title="GenEval",
    source="arXiv 2310.11513, djghosh13/geneval@af4902f",
    size=553,
    images_per_prompt=4,
    judges={"geneval": Judge("geneval", published="Mask2Former Swin-S of mmdet, CLIP ViT-L/14 of open_clip")},
    prompts=str(Path(__file__).parent / "data/geneval.jsonl"),
    where="the 553 prompts are part of this package (MIT, data/geneval.LICENSE)",
    comparable="Not one to one with published figures: the detector has their architecture and data, but the weights "
    "of transformers instead of mmdet. Compare models with each other; for their own score, --official_layout true "
    "writes the images as evaluate_images.py reads them.",
    headline="overall",
    needs=("tag", "include"),
    layout="{index:05d}/samples/{sample:05d}.png",
)


@register_benchmark("geneval", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean of the tasks, each task's share of correct images, and the share of prompts with one."""
    tasks = {tag: mean(one.answer("geneval") for one in own) for tag, own in by(judged, "tag").items()}
    prompts: dict[int, list[float]] = {}
    for one in judged:
        prompts.setdefault(one.index, []).append(one.answer("geneval"))
    solved = mean(float(any(answer == 1 for answer in own)) for own in prompts.values())
    return {"overall": mean(tasks.values()), **tasks, "prompts with a correct image": solved}
