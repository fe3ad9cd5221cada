"""The dry run of a training: its configuration, its arithmetic, its memory and its time. It writes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from diffalign.config import to_yaml
from diffalign.forecast.cost import Method, Share, Work, run_work
from diffalign.forecast.memory import free_memory, memory_lines, memory_of
from diffalign.forecast.per_trainer import METHODS
from diffalign.forecast.timing import Pace, measure
from diffalign.models.meta_device import model_on_meta
from diffalign.models.weight_memory import Spread
from diffalign.rewards.support.probe import untried
from diffalign.runtime.processes import wants_shards
from diffalign.trainers.arguments import load_optional

MEANING = {
    "sampling": "to make images",
    "training": "forward and backward, at most",
    "comparing": "reference, recomputed calls, checks",
    "evaluating": "to make held-out images, and to watch them",
}


def dry_run(name: str, args: Any, trainer: type) -> int:
    """Prints what the run of trainer ``name`` will do; 1 where it does not fit. ValueError: it cannot run at all."""
    args.validate()
    share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    spread = None
    if (shards := wants_shards(torch.device("cpu"))) is not None:
        args.validate_shards()
        spread = Spread(share.world, shards.keep)
    show = print if share.rank == 0 else lambda *lines: None
    show(f"configuration\n{_indented(to_yaml(args).splitlines())}")
    method = METHODS[name]
    show(f"\nbatches\n{_indented(method.batches(args, share))}")
    held_out = len(load_optional(args.eval_prompts))
    model = model_on_meta(
        args.model,
        revision=args.revision,
        dtype=args.base_dtype,
        max_sequence_length=args.max_sequence_length,
        resolution=args.resolution,
        embedded_guidance=args.embedded_guidance,
    )
    # Whether a scale guides is the family's to say; the weight of the positive output means one thing in all of them.
    counted = replace(args, guidance_scale=model.guidance_factor(args.guidance_scale))
    total = sum((run_work(method, counted, Share(rank, share.world), held_out) for rank in range(share.world)), Work())
    show(f"\nmodel evaluations, over all processes\n{_indented(evaluation_lines(total, args))}")
    method.train(args, model)
    # In main memory there is no place to leave to.
    there = args if torch.cuda.is_available() else replace(args, offload=())
    forecast = memory_of(model, method, there, share, spread)
    free, place = free_memory()
    show(f"\nmemory of a process\n{_indented(memory_lines(forecast, free, place))}")
    show("\ntime")
    if forecast.peak > free:
        advice = "set offload: [text_encoders, vae], shard it (configs/accelerate), or take a smaller model"
        show(_indented([f"not measured: it does not fit. Where it is not done yet, {advice}"]))
        return 1
    timed = replace(method, passes=lambda _: method.passes(counted))
    with untried():
        made = trainer(args=args)
    return _timed(made, timed, run_work(method, counted, share, held_out), show)


def _timed(trainer: Any, method: Method, work: Work, show: Any) -> int:
    try:
        pace = measure(trainer, *method.passes(trainer.args), work.judged > 0)
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
