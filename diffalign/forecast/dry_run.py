"""Dry run of a training: print its configuration, model evaluations, memory and time; write nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from diffalign import device
from diffalign.config import to_yaml
from diffalign.data.prompts import count_prompts
from diffalign.forecast.cards import Card, find_card
from diffalign.forecast.cost import run_work
from diffalign.forecast.rehearsal import NOT_FAKE, rehearse
from diffalign.forecast.report import GIB, peak_line, phase_lines, time_lines
from diffalign.forecast.timing import Pace, measure
from diffalign.models.meta_device import model_on_meta
from diffalign.models.single_file import is_local
from diffalign.models.weight_memory import Spread
from diffalign.rewards.support.probe import untried
from diffalign.runtime.progress import duration
from diffalign.trainers.base import Trainer
from diffalign.trainers.cost import Share, Work
from diffalign.trainers.registry import Entry

UNKNOWN = "not estimated: algorithm {name} registers no cost"
MEANING = {
    "sampling": "to make images",
    "training": "forward and backward, at most",
    "comparing": "reference, recomputed calls, checks",
    "evaluating": "to make held-out images, and to watch them",
}
Show = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Processes and device of a run.

    Attributes:
        share: This process.
        spread: Sharding of the denoiser; None without.
        card: A named card; None for this machine.
        memory: Bytes of a card without a name; None for this machine.
    """

    share: Share
    spread: Spread | None = None
    card: Card | None = None
    memory: int | None = None

    @property
    def cpu(self) -> bool:
        """Whether this is a machine without an accelerator."""
        return self.card is None and self.memory is None and not torch.accelerator.is_available()

    @property
    def free(self) -> tuple[int, str]:
        """Bytes that a run may use, and of what."""
        if self.card is not None:
            return self.card.memory * 10**9, self.card.title
        return free_memory() if self.memory is None else (self.memory, "by the setting memory")


def place_of(world: int | None = None, card: str | None = None) -> Place:
    """Read rank, number of processes and sharding from the launcher; ``world`` and ``card`` override."""
    share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if world is not None:
        share = Share(0, world)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and share.world > 1
    keep = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    return Place(share, Spread(share.world, keep) if sharded else None, find_card(card) if card else None)


def dry_run(entry: Entry, config: Any, place: Place, *, timed: bool = True) -> int:
    """Print what a run of an algorithm will do.

    Args:
        entry: The algorithm.
        config: Its configuration.
        place: Processes and device to forecast for.
        timed: Whether to time passes on this machine, if the model's weights are in a folder here.

    Returns:
        0, or 1 if it does not fit into memory.

    Raises:
        ValueError: It cannot run at all.
    """
    config.validate()
    if place.spread is not None:
        config.validate_shards()
    show: Show = print if place.share.rank == 0 else lambda text: None
    show(f"configuration\n{_indented(to_yaml(config).splitlines())}")
    work = _count(entry, config, place.share, show)

    try:
        found = rehearse(entry, config, place.share.world, place.spread, cpu=place.cpu)
    except NOT_FAKE as error:
        why = f"{type(error).__name__}: {str(error)[:300]}"
        show(f"\nmemory of a process\n{_indented([f'not forecast: its code does not run on fake tensors ({why})'])}")
    else:
        free, where = place.free
        lines = [*phase_lines(found), peak_line(found, config), f"free: {free / GIB:.1f} GiB, {where}", *found.notes]
        show(f"\nmemory of a process, and what it computes in an iteration\n{_indented(lines)}")
        if place.card is not None:
            show(f"\ntime\n{_indented(time_lines(found, config, place.card))}")
        if found.peak > free:
            show(_indented(["it does not fit"]))
            return 1
    if place.card is not None or not timed or (place.memory is not None and not torch.accelerator.is_available()):
        return 0
    return _measured(entry, config, work, show)


def _count(entry: Entry, config: Any, share: Share, show: Show) -> Work | None:
    """Print batches and model evaluations; return the work of this process."""
    cost = entry.cost
    if cost is None:
        show(f"\nbatches and evaluations\n{_indented([UNKNOWN.format(name=entry.name)])}")
        return None
    show(f"\nbatches\n{_indented(cost.batches(config, share))}")
    held_out = count_prompts(config.eval_prompts)
    counted = counted_config(config)
    total = sum((run_work(cost, counted, Share(rank, share.world), held_out) for rank in range(share.world)), Work())
    show(f"\nmodel evaluations, over all processes\n{_indented(evaluation_lines(total, config))}")
    return run_work(cost, counted, share, held_out)


def counted_config(config: Any) -> Any:
    """Return a configuration whose guidance scale is the weight of the positive output, in every family."""
    model = model_on_meta(config.model, revision=config.revision, resolution=config.resolution)
    return replace(config, guidance_scale=model.guidance_factor(config.guidance_scale))


def _measured(entry: Entry, config: Any, work: Work | None, show: Show) -> int:
    """Load the model of a folder, and time passes on this machine."""
    show("\ntime")
    if not is_local(config.model):
        show(
            _indented(["not measured, because weights are not fetched: name a card, e.g. --card h100, for a forecast"])
        )
        return 0
    with untried():
        trainer = entry.trainer(args=config)
    if entry.cost is None or work is None:
        show(_indented([UNKNOWN.format(name=entry.name)]))
        return 0
    return _timed(trainer, entry.cost.passes(counted_config(config)), work, show)


def _timed(trainer: Trainer[Any], passes: tuple[int, int], work: Work, show: Show) -> int:
    """Time passes of a trainer. passes: images per pass (while sampling, while training)."""
    try:
        pace = measure(trainer.run, trainer.loop.state.optimizer, *passes, judging=work.judged > 0)
    except torch.OutOfMemoryError as error:
        batches = "train_batch_size or rollout_batch_size, or set gradient_checkpointing: true"
        show(_indented([f"a pass does not fit ({str(error).splitlines()[0]}): lower {batches}"]))
        return 1
    show(_indented(pace_lines(pace, work, trainer.args.max_train_steps)))
    return 0


def evaluation_lines(work: Work, args: Any) -> list[str]:
    """Format a line per kind of evaluations: for the whole run, and per generated image or else optimizer step."""
    per, noun = (work.generated, "image") if work.generated else (args.max_train_steps, "optimizer step")
    counts = asdict(work)
    lines = [
        f"{kind:10} {counts[kind]:>15,}  {counts[kind] / per:10.2f} per {noun}  {meaning}"
        for kind, meaning in MEANING.items()
    ]
    generated = [f"{work.generated:,} images are made to train on"] if work.generated else []
    if getattr(getattr(args, "rollout_cache", None), "kind", "none") != "none":
        generated.append("rollout_cache skips layers of some of the sampling: see cache/computed_share in metrics")
    return [*lines, f"{'in all':10} {work.evaluations:>15,}  {work.evaluations / per:10.2f} per {noun}", *generated]


def pace_lines(pace: Pace, work: Work, steps: int) -> list[str]:
    """Format the measured seconds per image, and the time of the run computed from them."""
    seconds = pace.seconds(work)
    each = (
        f"{1000 * pace.forward:.2f} ms per evaluation, {1000 * pace.training:.2f} ms with its backward pass, "
        f"{1000 * pace.decoding:.2f} ms to decode an image"
    )
    total = f"{duration(seconds)} in all, {seconds / steps:.2f} s per optimizer step, without rewards"
    peak = [] if pace.peak is None else [f"a training pass peaks at {pace.peak:.1f} GiB"]
    return [each, total, *peak]


def free_memory() -> tuple[int, str]:
    """Return the free bytes of the device that a run would use, and its name."""
    return device.free_memory(device.default_device())


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
