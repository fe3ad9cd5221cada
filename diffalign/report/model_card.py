"""The README.md of a run folder, in the format of the Hub's model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub import ModelCard as HubCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

from diffalign.atomic import write_text
from diffalign.files import printable
from diffalign.models.single_file import single_file
from diffalign.report.markdown import inert, inline_code
from diffalign.report.results import ModelResults

TASK, EDIT = "text-to-image", "image-to-image"  # of the Hub
LICENSE = ("license", "license_name", "license_link")


def literal(text: object) -> str:
    """Format a text as a Python literal: one line between double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


@dataclass(frozen=True)
class ModelCard:
    """What a run did, and how to use its weights.

    Attributes:
        title: Name of the model.
        base_model: Hub id or folder.
        trainer: E.g. "flow_grpo".
        command: Shell line that starts the run.
        config_yaml: Resolved configuration.
        load_snippet: Python that loads the weights with diffusers.
        results: Markdown, e.g. the table of ``results.to_markdown``; empty for none.
        pictures: File names beside the card.
        tags: Added to the default ones.
        lora: False for full weights.
        init: LoRA that training went on from; empty for none.
        evaluation: Results for the metadata, see ``eval_results``.
        sample_prompt: Prompt that the Hub's page offers to try; empty for none.
        examples: (prompt, file beside the card) of pictures for the Hub's page.
        datasets: Hub ids of the data that it was trained on.
        task: ``TASK``, or ``EDIT`` for models that edit.
    """

    title: str
    base_model: str
    trainer: str
    command: str
    config_yaml: str
    load_snippet: str
    results: str = ""
    pictures: Sequence[str] = ()
    tags: Sequence[str] = ()
    lora: bool = True
    init: str = ""
    evaluation: Sequence[EvalResult] = ()
    sample_prompt: str = ""
    examples: Sequence[tuple[str, str]] = ()
    datasets: Sequence[str] = ()
    task: str = TASK


def write_model_card(path: str | Path, card: ModelCard) -> Path:
    """Write a card as UTF-8 to a file, or to README.md in a folder; return the file.

    Raises ValueError if ``huggingface_hub`` cannot read the metadata back.
    """
    path = Path(path)
    file = path / "README.md" if path.is_dir() else path
    what = "A LoRA" if card.lora else "A denoiser with all of its weights tuned,"
    origin = f", going on from the LoRA {inline_code(card.init)}" if card.init else ""
    sections = [
        f"# {inert(card.title)}",
        f"{what} for {inline_code(card.base_model)}, trained with diffalign ({card.trainer}){origin}.",
        "## Use",
        _fenced(card.load_snippet, "python"),
        *(["## Results", card.results] if card.results else []),
        *(f"![{inert(Path(name).stem)}]({quote(name)})" for name in card.pictures),
        "## Training",
        _fenced(card.command, "bash"),
        _fenced(card.config_yaml, "yaml"),
    ]
    metadata = f"---\n{card_data(card).to_yaml(line_break=chr(10))}\n---\n"
    HubCard(metadata)
    write_text(file, metadata + "\n" + "\n\n".join(sections) + "\n")
    return file


def card_data(card: ModelCard) -> ModelCardData:
    """Return the metadata of a card. There is no ``instance_prompt``: preference tuning teaches no trigger word."""
    file = single_file(card.base_model)
    source = card.base_model if file is None else (file.on_hub or ("",))[0]  # a fine-tuned file is not its base
    base = _hub_id(source)
    license: dict[str, Any] = dict(_license_of(source))
    kind = ["lora"] if card.lora else []
    relation: dict[str, Any] = {"base_model_relation": "adapter" if card.lora else "finetune"} if base else {}
    shown = [{"text": printable(text), "output": {"url": quote(name)}} for text, name in card.examples if text.strip()]
    asked = [{"text": printable(card.sample_prompt)}] if card.sample_prompt.strip() else []
    widget: dict[str, Any] = {"widget": shown or asked} if shown or asked else {}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=card.task,
        base_model=base,
        **relation,
        **license,
        tags=[printable(tag) for tag in (*kind, card.task, "diffalign", card.trainer, *card.tags)],
        **widget,
        datasets=list(card.datasets) or None,
        model_name=printable(card.title) or "model",
        eval_results=list(card.evaluation) or None,
    )


def eval_results(found: ModelResults, prompts: str | Path, task: str = TASK) -> list[EvalResult]:
    """Return the mean of each reward over held-out prompts, with its 95 % interval, for ``ModelCard.evaluation``.

    Args:
        found: Results of the tuned model; rewards that scored no image are left out.
        prompts: File of the prompts; its name becomes the dataset's name.
        task: As in ``ModelCard``.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=printable(Path(prompts).name),
            metric_type=printable(name),
            metric_name=printable(name),
            metric_value=float(mean.mean),
            metric_args={"interval_95": [float(mean.low), float(mean.high)], "images": found.scored.get(name, 0)},
        )
        for name, mean in found.rewards.items()
        if mean is not None
    ]


def _hub_id(model: str) -> str | None:
    """Return the id, or None for a folder: the Hub refuses a card whose base model is a local path."""
    try:
        validate_repo_id(model)
        return None if Path(model).exists() else model
    except (HFValidationError, OSError, ValueError):
        return None


def _license_of(base_model: str) -> dict[str, str]:
    """Return the license fields of the base model's own card, if that is on this machine; tuned weights inherit it."""
    try:
        readme = Path(base_model) / "README.md"
        if not readme.is_file():
            cached = try_to_load_from_cache(base_model, "README.md")
            if not isinstance(cached, str):
                return {}
            readme = Path(cached)
        data = HubCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        return {name: value for name in LICENSE if isinstance(value := data.get(name), str)}
    except Exception:  # a broken README.md of somebody else's must not cost the card
        return {}


def _fenced(text: str, language: str) -> str:
    """Format a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
