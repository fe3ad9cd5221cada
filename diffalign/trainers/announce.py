"""Messages of a run: at its start what it will do, at its end what it achieved and where that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffalign.remote import shown
from diffalign.report.run_report import Report
from diffalign.runtime.progress import evaluations_left
from diffalign.runtime.run import Run
from diffalign.trainers.inputs import Inputs, held_out_sentence


def opening(run: Run[Any], inputs: Inputs[Any], parameters: Sequence[Tensor]) -> str:
    """Describe the run's model, data, rewards, steps, evaluations and folder, a line each."""
    config, model = run.config, run.model
    trained = sum(p.numel() for p in parameters)
    if model.negative is not None:
        what = "a negative prompt"
    else:
        what = f"LoRA of rank {model.adapter_rank}" if model.has_adapter else f"full {model.denoiser_name}"
    if config.lora.init and model.negative is None:
        what += f", going on from {config.lora.init}"
    lines = {
        "model": f"{config.model}, {what}: {trained:,} parameters train, on {run.accelerator.device}",
        "data": _data(config),
        "rewards": _rewards(config),
        "steps": f"{config.max_train_steps} optimizer steps" + (f", {run.world} processes" if run.world > 1 else ""),
        "evaluations": _evaluations(config, inputs),
        "held out": held_out_sentence(inputs),
        "output": str(config.output_dir),
    }
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


def _data(args: Any) -> str:
    """Return the sources of prompts, pairs or images; empty if they were passed from Python."""
    names = ("train_data", "train_prompts", "train_rollouts", "train_images")
    found = [getattr(args, name, None) for name in names]
    sources = [shown(one) for value in found if value for one in (value if isinstance(value, tuple) else (value,))]
    return ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")


def _rewards(args: Any) -> str:
    table = getattr(args, "rewards", {})
    weights = {name: getattr(entry, "weight", entry) for name, entry in table.items()}
    return ", ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def _evaluations(config: Any, inputs: Inputs[Any]) -> str:
    if not inputs.eval_prompts:
        return "none: give eval_prompts to see what the run achieves"
    count = 1 + evaluations_left(0, config.max_train_steps, config.eval_steps)
    prompts = len(inputs.eval_prompts)
    of = f"{prompts * config.eval_images_per_prompt} images each ({prompts} prompts)"
    return f"{count}, of {of}, by {', '.join(inputs.eval_rewards)}"


def closing(report: Report) -> str:
    """Describe the means of base and tuned model, and the paths of weights, card and plots."""
    lines = {}
    if report.shown is not None:
        found = report.figures(report.before)
        images = found["tuned"].images
        means = [
            f"{name} {' -> '.join(_mean(f.rewards[name]) for f in found.values())}" for name in report.shown.scores
        ]
        names = " -> ".join(found)
        lines["achieved"] = f"{', '.join(means)} ({names}, over all {images} images, after {report.step} steps)"
    lines["alarm"] = report.alarm
    lines["weights"] = ", ".join(str(path) for path in report.paths)
    lines["card"] = str(report.folder / "README.md")
    pictures = [report.folder / name for name in ("compare.png", "curves.png") if (report.folder / name).is_file()]
    lines["pictures"] = ", ".join(map(str, pictures))
    lines["compare"] = report.compare_command
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


def _mean(interval: Any) -> str:
    return "–" if interval is None else f"{interval.mean:.3f}"
