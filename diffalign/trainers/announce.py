"""What a run says of itself: at its start what it will do, at its end what it achieved and where that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.runtime.progress import evaluations_left

if TYPE_CHECKING:
    from diffalign.trainers.base import Trainer
    from diffalign.trainers.report import Report


def opening(trainer: Trainer) -> str:
    """The run's model, data, rewards, steps, evaluations and folder, a line each."""
    args: Any = trainer.args
    trained = sum(p.numel() for p in trainer.loop.parameters)
    if trainer.model.negative is not None:
        what = "a negative prompt"
    else:
        what = f"LoRA of rank {args.lora.rank}" if trainer.model.has_adapter else f"full {trainer.model.denoiser_name}"
    lines = {
        "model": f"{args.model}, {what}: {trained:,} parameters train, on {trainer.accelerator.device}",
        "data": _data(args),
        "rewards": _rewards(args),
        "steps": f"{args.max_train_steps} optimizer steps{_processes(trainer)}",
        "evaluations": _evaluations(trainer),
        "output": str(args.output_dir),
    }
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


def _data(args: Any) -> str:
    """Where prompts, pairs or images come from; none where they were passed from Python."""
    names = ("train_data", "train_prompts", "train_rollouts", "train_images")
    found = [getattr(args, name, None) for name in names]
    sources = [str(one) for value in found if value for one in (value if isinstance(value, tuple) else (value,))]
    return ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")


def _rewards(args: Any) -> str:
    table = getattr(args, "rewards", {})
    weights = {name: getattr(entry, "weight", entry) for name, entry in table.items()}
    return ", ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def _processes(trainer: Trainer) -> str:
    count = trainer.accelerator.num_processes
    return f", {count} processes" if count > 1 else ""


def _evaluations(trainer: Trainer) -> str:
    args = trainer.args
    if not trainer.eval_prompts:
        return "none: give eval_prompts to see what the run achieves"
    count = 1 + evaluations_left(0, args.max_train_steps, args.eval_steps)
    prompts = len(trainer.eval_prompts)
    of = f"{prompts * args.eval_images_per_prompt} images each ({prompts} prompts)"
    return f"{count}, of {of}, by {', '.join(trainer.evaluation.rewards)}"


def closing(report: Report) -> str:
    """The base's and the tuned model's means, and where the weights, the card and the pictures are."""
    lines = {}
    if report.shown is not None:
        found = report.figures(report.before)
        images = found["tuned"].images
        means = [
            f"{name} {' -> '.join(_mean(f.rewards[name]) for f in found.values())}" for name in report.shown.scores
        ]
        names = " -> ".join(found)
        lines["achieved"] = f"{', '.join(means)} ({names}, over all {images} images, after {report.step} steps)"
    lines["weights"] = ", ".join(str(path) for path in report.paths)
    lines["card"] = str(report.folder / "README.md")
    pictures = [report.folder / name for name in ("compare.png", "curves.png") if (report.folder / name).is_file()]
    lines["pictures"] = ", ".join(map(str, pictures))
    lines["compare"] = report.compare_command
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


def _mean(interval: Any) -> str:
    return "–" if interval is None else f"{interval.mean:.3f}"
