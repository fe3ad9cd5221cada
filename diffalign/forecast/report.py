"""Describe what a rehearsal found: memory by phase, operations, evaluations, and the time on a named card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.forecast.cards import SHARE_OF_BANDWIDTH, SHARE_OF_RATE, Card, seconds
from diffalign.forecast.fake_rewards import JUDGING
from diffalign.forecast.rehearsal import (
    BACKWARD,
    DECODE,
    ENCODE,
    EVALUATE,
    EVALUATING,
    SAMPLING,
    SCORING,
    STEPPING,
    TRAINING,
    WEIGHTS,
    Rehearsed,
)
from diffalign.runtime.oom import batch_name

GIB = 2**30
PHASES = {
    WEIGHTS: "weights and optimizer state",
    SAMPLING: "sample, or read data",
    SCORING: "score, advantages",
    TRAINING: "forward and backward",
    STEPPING: "optimizer step",
    EVALUATING: "a batch of held-out images",
}
PARTS = {
    ENCODE: "prompts are encoded",
    DECODE: "images are decoded",
    "encode_images": "images are encoded",
    EVALUATE: "the denoiser runs",
    BACKWARD: "gradients are computed",
    JUDGING: "rewards score",
}
# What lowers a peak -> whether a configuration can still set it; in order of what it costs.
Lowering = tuple[str, str, Any]
OFFLOAD_TEXT: Lowering = ("offload: [text_encoders]", "offload", "text_encoders")
OFFLOAD_VAE: Lowering = ("offload: [vae]", "offload", "vae")
BASE: tuple[Lowering, ...] = (
    ("base_precision: bf16", "base_precision", "bf16"),
    ("quantise: 4bit", "quantise", "4bit"),
)
CHECKPOINTING: Lowering = ("gradient_checkpointing: true", "gradient_checkpointing", True)
LOWERING: Mapping[tuple[str, str], tuple[Lowering, ...]] = {
    (SAMPLING, ENCODE): (OFFLOAD_TEXT, *BASE),
    (SAMPLING, DECODE): (("a smaller rollout_batch_size", "rollout_batch_size", 1), OFFLOAD_VAE),
    (SAMPLING, EVALUATE): (("a smaller rollout_batch_size", "rollout_batch_size", 1), OFFLOAD_TEXT, *BASE),
    (SAMPLING, JUDGING): (
        ("a smaller rollout_batch_size", "rollout_batch_size", 1),
        ("offload: [rewards]", "offload", "rewards"),
        ("overlap_rewards: false", "overlap_rewards", False),
    ),
    (TRAINING, JUDGING): (
        ("decode_slice: 1", "decode_slice", 1),
        ("a smaller train_batch_size", "train_batch_size", 1),
    ),
    (EVALUATING, ENCODE): (OFFLOAD_TEXT, *BASE),
    (TRAINING, DECODE): (
        ("vae_checkpointing: true", "vae_checkpointing", True),
        ("decode_slice: 1", "decode_slice", 1),
    ),
}
OTHERWISE: tuple[Lowering, ...] = (
    ("a smaller train_batch_size", "train_batch_size", 1),
    CHECKPOINTING,
    OFFLOAD_TEXT,
    OFFLOAD_VAE,
    *BASE,
)


def phase_lines(found: Rehearsed) -> list[str]:
    """Format a line per phase, and one that names the phase and part with the peak."""
    lines = []
    for phase, title in PHASES.items():
        flops, calls = found.total(found.flops, phase), found.calls.get((phase, EVALUATE), 0)
        work = f"{flops / 1e12:12,.1f} TFLOP  {calls:8,} evaluations" if flops else ""
        lines.append(f"{title:28} {found.peak_of(phase) / GIB:8.2f} GiB {work}".rstrip())
    return lines


def peak_line(found: Rehearsed, config: Any) -> str:
    """Say where the peak is, and what lowers it."""
    phase, part = found.peak_at
    when = PARTS.get(part, PHASES[phase])
    known = LOWERING.get((phase, part), OTHERWISE)
    if phase == EVALUATING and part != ENCODE:
        batch = batch_name(config, "evaluate")
        known = ((f"a smaller {batch}", batch, 1), OFFLOAD_TEXT, OFFLOAD_VAE)
    lower = [text for text, name, value in known if _can_set(config, name, value)]
    advice = f"; {' or '.join(lower[:3])} would lower it" if lower else "; a smaller resolution or model would lower it"
    return f"peak: {found.peak / GIB:.2f} GiB while {when} ({PHASES[phase]}){advice}"


def _can_set(config: Any, name: str, value: Any) -> bool:
    """Return whether a configuration has a field, and not this value in it."""
    if not hasattr(config, name):
        return False
    given = getattr(config, name)
    if (name == "base_precision" and config.lora.rank == 0) or (name == "quantise" and config.lora.rank == 0):
        return False
    if value == "text_encoders" and config.lora.text_encoder:
        return False
    return value not in given if isinstance(given, tuple) else given != value


def time_lines(found: Rehearsed, config: Any, card: Card) -> list[str]:
    """Forecast the time of an iteration on a card, phase by phase, and that of the run."""
    half = config.mixed_precision != "no" or config.base_precision == "bf16"
    times = {
        phase: seconds(card, found.total(found.flops, phase), found.total(found.traffic, phase), half)
        for phase in (SAMPLING, SCORING, TRAINING, STEPPING)
    }
    each = times[SAMPLING] + times[SCORING] + found.updates * (times[TRAINING] + times[STEPPING])
    total = each * config.max_train_steps / found.updates
    sampled = f"{times[SAMPLING] + times[SCORING]:.1f} s to sample, or read"
    trained = f"{times[TRAINING] + times[STEPPING]:.1f} s per optimizer step"
    return [
        f"{card.title}: {sampled}, and {trained}; {each:.1f} s an iteration, {total / 3600:.1f} h in all",
        f"assumed: {SHARE_OF_RATE:.0%} of the peak rate, or {SHARE_OF_BANDWIDTH:.0%} of the bandwidth where that takes "
        f"longer ({card.source}); without rewards, evaluations and checkpoints; measured on no card",
    ]
