"""The dry run of a training: its configuration, its arithmetic, its memory and its time. It writes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch

from diffalign.config import to_yaml
from diffalign.forecast.methods import METHODS
from diffalign.forecast.timing import Pace, measure
from diffalign.forecast.work import Method, Share, Work, run_work
from diffalign.models import DiffusionModel
from diffalign.models.memory import MemoryNeeds, memory_needs
from diffalign.models.meta import model_on_meta
from diffalign.models.quantise import saved_bytes
from diffalign.trainers.inputs import load_optional

GIB = 2**30
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
    show = print if share.rank == 0 else lambda *lines: None
    show(f"configuration\n{_indented(to_yaml(args).splitlines())}")
    method = METHODS[name]
    show(f"\nbatches\n{_indented(method.batches(args, share))}")
    held_out = len(load_optional(args.eval_prompts))
    total = sum((run_work(method, args, Share(rank, share.world), held_out) for rank in range(share.world)), Work())
    show(f"\nmodel evaluations, over all processes\n{_indented(evaluation_lines(total, args))}")
    model = model_on_meta(
        args.model,
        revision=args.revision,
        dtype=args.base_dtype,
        max_sequence_length=args.max_sequence_length,
        resolution=args.resolution,
        embedded_guidance=args.embedded_guidance,
    )
    method.train(args, model)
    needs, needed, saved = memory_of(model, method, args, share)
    free, place = free_memory()
    show(f"\nmemory of a process\n{_indented(memory_lines(needs, needed, saved, free, place))}")
    show("\ntime")
    if needed > free:
        show(_indented(["not measured: it does not fit. Shard it (configs/accelerate), or take a smaller model"]))
        return 1
    return _timed(trainer(args=args), method, run_work(method, args, share, held_out), show)


def memory_of(model: DiffusionModel, method: Method, args: Any, share: Share) -> tuple[MemoryNeeds, int, int]:
    """Bytes of a process by purpose, in all, and what quantisation saves. model: made trainable, on meta or not.

    What an iteration keeps is in it; activations and rewards are not.
    """
    needs = memory_needs(model, pairs=0, copies=method.copies(args))
    if args.optimizer == "adamw_8bit":
        needs = replace(needs, moments=needs.moments // torch.float32.itemsize)
    saved = saved_bytes(model.raw_denoiser, args.quantise)
    return needs, needs.total - saved + method.stored(args, model.latent_shape(), share), saved


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


def memory_lines(needs: MemoryNeeds, needed: int, saved: int, free: int, place: str) -> list[str]:
    """A line per purpose."""
    frozen = {f"frozen, {str(dtype).removeprefix('torch.')}": size for dtype, size in needs.frozen.items()}
    rows = {
        **frozen,
        "trained": needs.trainable,
        "gradients": needs.gradients,
        "optimizer": needs.moments,
        "copies of what is trained": needs.copies,
        "stored latents": needed + saved - needs.total,
        "saved by quantisation": -saved,
        "in all": needed,
    }
    lines = [f"{name:26} {size / GIB:8.3f} GiB" for name, size in rows.items() if size]
    return [*lines, f"free: {free / GIB:.1f} GiB, {place}; activations and rewards come on top"]


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


def free_memory() -> tuple[int, str]:
    """(bytes, of what) where the model would go."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return psutil.virtual_memory().available, "main memory"


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
