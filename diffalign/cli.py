"""The ``diffalign`` command."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from diffalign.config import describe, parse
from diffalign.evaluation.evaluate import compare, evaluate
from diffalign.evaluation.settings import EvaluationConfig
from diffalign.trainers.flow_grpo import FlowGRPOTrainer
from diffalign.trainers.flow_grpo_config import FlowGRPOConfig

TRAINERS: dict[str, tuple[type, type]] = {"flow_grpo": (FlowGRPOConfig, FlowGRPOTrainer)}
USAGE = """usage: diffalign train TRAINER --config FILE.yaml [--field VALUE ...]
       diffalign eval MODEL ... [--field VALUE ...]      figures: rewards, win rates, tasks, diversity
       diffalign compare MODEL ... [--field VALUE ...]   pictures: compare.png and compare.html

trainers: {trainers}
models: run folders, checkpoints, LoRA files, full weights; NAME=PATH names one, PATH@0.5 scales a LoRA
help on the fields: diffalign train TRAINER --help, diffalign eval --help, diffalign compare --help"""


def use_all_cores() -> None:
    """Gives each local process its share of the cores: ``accelerate launch`` would leave one thread to each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def train(argv: Sequence[str]) -> None:
    """``diffalign train TRAINER ...``: resolves the configuration and runs the trainer."""
    if not argv or argv[0] not in TRAINERS:
        raise ValueError(f"name a trainer: {', '.join(TRAINERS)}")
    config, trainer = TRAINERS[argv[0]]
    if "--help" in argv or "-h" in argv:
        print(describe(config))
        return
    use_all_cores()
    trainer(args=parse(config, argv[1:])).train()


def judge(run: Callable[[EvaluationConfig], object], argv: Sequence[str]) -> None:
    """``diffalign eval|compare MODEL ...``: models first, then fields."""
    if "--help" in argv or "-h" in argv:
        print(describe(EvaluationConfig))
        return
    first = next((i for i, token in enumerate(argv) if token.startswith("--")), len(argv))
    config = parse(EvaluationConfig, argv[first:])
    use_all_cores()
    run(dataclasses.replace(config, models=(*argv[:first], *config.models)))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": partial(judge, evaluate),
    "compare": partial(judge, compare),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 2 for what the user can mend, said in one line."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(USAGE.format(trainers=", ".join(TRAINERS)))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"diffalign: {error}", file=sys.stderr)
        return 2
    return 0
