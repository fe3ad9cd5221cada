"""Dry run of a training: print its configuration, model evaluations, memory and time; write nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from diffalign.config import to_yaml
from diffalign.device import default_device, separate_memory
from diffalign.forecast.cost import run_work
from diffalign.forecast.memory import free_memory, memory_lines, memory_of
from diffalign.forecast.timing import Pace, measure
from diffalign.models.meta_device import model_on_meta
from diffalign.models.weight_memory import Spread
from diffalign.rewards.support.probe import untried
from diffalign.runtime.processes import wants_shards
from diffalign.trainers.base import Trainer
from diffalign.trainers.cost import Share, Work
from diffalign.trainers.inputs import load_optional
from diffalign.trainers.registry import Entry

UNKNOWN = "not estimated: algorithm {name} registers no cost"
MEANING = {
    "sampling": "to make images",
    "training": "forward and backward, at most",
    "comparing": "reference, recomputed calls, checks",
    "evaluating": "to make held-out images, and to watch them",
}


def dry_run(entry: Entry, config: Any) -> int:
    """Print what a run of an algorithm will do.

    Returns:
        0, or 1 if it does not fit into memory.

    Raises:
        ValueError: It cannot run at all.
    """
    config.validate()
    share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    spread = None
    if (shards := wants_shards(torch.device("cpu"))) is not None:
        config.validate_shards()
        spread = Spread(share.world, shards.keep)
    show: Callable[[str], None] = print if share.rank == 0 else lambda text: None
    show(f"configuration\n{_indented(to_yaml(config).splitlines())}")
    if entry.cost is None:
        show(f"\nbatches, evaluations, memory and time\n{_indented([UNKNOWN.format(name=entry.name)])}")
        with untried():
            entry.trainer(args=config)
        return 0
    cost = entry.cost
    show(f"\nbatches\n{_indented(cost.batches(config, share))}")

    held_out = len(load_optional(config.eval_prompts))
    model = model_on_meta(
        config.model,
        revision=config.revision,
        dtype=config.base_dtype,
        max_sequence_length=config.max_sequence_length,
        resolution=config.resolution,
        embedded_guidance=config.embedded_guidance,
    )
    # Families define guidance scales differently; the weight of the positive output means one thing in all of them.
    counted = replace(config, guidance_scale=model.guidance_factor(config.guidance_scale))
    total = sum((run_work(cost, counted, Share(rank, share.world), held_out) for rank in range(share.world)), Work())
    show(f"\nmodel evaluations, over all processes\n{_indented(evaluation_lines(total, config))}")

    cost.train(config, model)
    # In main memory, offloading frees nothing.
    there = config if separate_memory(default_device()) else replace(config, offload=())
    forecast = memory_of(model, cost, there, share, spread)
    free, place = free_memory()
    show(f"\nmemory of a process\n{_indented(memory_lines(forecast, free, place))}")
    show("\ntime")
    if forecast.peak > free:
        advice = "set offload: [text_encoders, vae], shard it (configs/accelerate), or take a smaller model"
        show(_indented([f"not measured: it does not fit. Where it is not done yet, {advice}"]))
        return 1
    with untried():
        trainer = entry.trainer(args=config)
    return _timed(trainer, cost.passes(counted), run_work(cost, counted, share, held_out), show)


def _timed(trainer: Trainer[Any], passes: tuple[int, int], work: Work, show: Callable[[str], None]) -> int:
    """Time passes of a trainer. passes: images per pass (while sampling, while training)."""
    try:
        pace = measure(trainer.run, trainer.loop.state.optimizer, *passes, judging=work.judged > 0)
    except torch.OutOfMemoryError as error:
        batches = "train_batch_size or rollout_batch_size, or set gradient_checkpointing: true"
        show(_indented([f"a pass does not fit ({str(error).splitlines()[0]}): lower {batches}"]))
        return 1
    show(_indented(time_lines(pace, work, trainer.args.max_train_steps)))
    return 0


def evaluation_lines(work: Work, args: Any) -> list[str]:
    """A line per kind: of the whole run, and per image that is made or, where none is, per optimizer step."""
    per, noun = (work.generated, "image") if work.generated else (args.max_train_steps, "optimizer step")
    counts = asdict(work)
    lines = [
        f"{kind:10} {counts[kind]:>15,}  {counts[kind] / per:10.2f} per {noun}  {meaning}"
        for kind, meaning in MEANING.items()
    ]
    generated = [f"{work.generated:,} images are made to train on"] if work.generated else []
    return [*lines, f"{'in all':10} {work.evaluations:>15,}  {work.evaluations / per:10.2f} per {noun}", *generated]


def time_lines(pace: Pace, work: Work, steps: int) -> list[str]:
    """Seconds per image as measured, and what follows for the run."""
    seconds = pace.seconds(work)
    each = (
        f"{1000 * pace.forward:.2f} ms per evaluation, {1000 * pace.training:.2f} ms with its backward pass, "
        f"{1000 * pace.decoding:.2f} ms to decode an image"
    )
    total = f"{duration(seconds)} in all, {seconds / steps:.2f} s per optimizer step, without rewards"
    peak = [] if pace.peak is None else [f"a training pass peaks at {pace.peak:.1f} GiB"]
    return [each, total, *peak]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
