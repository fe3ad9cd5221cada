"""Write the figures of a judge as Markdown: its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.files import some
from diffalign.report.markdown import inert
from diffalign.rewards.support.judge_files import MEAN, About

Figures = Mapping[str, Any]


def to_markdown(figures: Figures) -> str:
    """Format the figures on held-out pairs."""
    accuracy = figures["accuracy"]
    parts = [
        f"{figures['pairs']} held-out pairs of {figures['prompts']} prompts that training has not seen, "
        f"{figures['ties']} of them ties: the judge prefers the image that raters prefer in {_rate(accuracy)} of the "
        f"others. Expected calibration error: {figures['ece']:.3f}."
    ]
    if own := figures.get("accuracy_of_own_rater"):
        parts.append(f"As the rater of each pair: {_rate(own)}.")
    bins = [
        [f"{one['low']:.1f} to {one['high']:.1f}", str(one["pairs"]), f"{one['confidence']:.2f}",
         _share(one["accuracy"])]
        for one in figures["reliability"]
    ]  # fmt: skip
    parts.append(_table(["confidence", "pairs", "mean", "right"], bins))
    raters = [
        [name, str(own["mean"]["pairs"]), _rate(own["mean"]), _rate(own["own"])]
        for name, own in figures["raters"].items()
        if own["mean"] is not None
    ]
    parts.append(_table(["rater", "pairs", f"{MEAN} rater right", "own rater right"], raters))
    judges = [[name, _rate(own["accuracy"]), _rate(own["agreement"])] for name, own in figures["judges"].items()]
    parts.append(_table(["other judge", "right", "agrees with this judge"], judges))
    return "\n\n".join(filter(None, parts))


# Model of raters -> what a plain model of transformers makes of the folder; "" is one judge of all.
PLAIN = {
    "": "In transformers it is a plain model, whose `logits_per_image` are its scores.",
    "pal_b": "In transformers it is a plain model, whose `logits_per_image` are the scores of the mean rater.",
    "pal_a": "Its score falls with the distance from a rater's ideal point (PAL's model A), which `raters.safetensors` "
    "holds beside a plain model of transformers.",
}


def card(title: str, about: About, folder: str, figures: Figures, raters: Sequence[str], label: str) -> str:
    """Return the model card of a judge.

    Args:
        title: Of the card.
        about: What was trained.
        folder: Of the judge, as commands name it.
        figures: On held-out pairs.
        raters: Names of raters.
        label: Command that labels the pairs it is least sure of; empty for none.
    """
    metrics = [{"type": "accuracy", "value": round(figures["accuracy"]["rate"], 4), "name": "held-out pairs"}]
    result = {"task": {"type": "image-text-to-text", "name": "preference of pairs"},
              "dataset": {"type": "preferences", "name": "held-out pairs"}, "metrics": metrics}  # fmt: skip
    head = {"library_name": "transformers", "tags": ["diffalign", "reward-model"], "base_model": about.backbone,
            "model-index": [{"name": title, "results": [result]}]}  # fmt: skip
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    one = f"`{{path: {folder}, options: {{rater: NAME}}}}`"
    named = f"\n\nThe judge of one rater is {one}; raters: {some(map(inert, raters), 20)}." if raters else ""
    return f"""---
{lines}
---

# {inert(title)}

A judge of images, trained with `diffalign train reward` on preference labels. It is a reward of every trainer and
command of diffalign:

```yaml
rewards:
  mine: {{path: {folder}}}
```

`diffalign score`, `eval`, `compare`, `label` and `relabel` take it with `--rewards mine --reward_options
'{{mine: {{path: {folder}}}}}'`. {PLAIN[about.rater_model]}{named}

## Held-out pairs

{to_markdown(figures)}
{_next(label)}"""


def _next(label: str) -> str:
    if not label:
        return ""
    return f"""
## Label next

The pairs that the judge is least sure of are in `label_next.parquet`:

```bash
{label}
```
"""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([inert(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rate(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{_share(found['rate'])} ({_share(found['low'])} to {_share(found['high'])})"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
