"""The ``diffalign`` command."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from diffalign.config import describe, parse
from diffalign.doctor.command import DoctorConfig
from diffalign.doctor.command import run as examine
from diffalign.evaluation.check import CheckConfig
from diffalign.evaluation.check import run as check
from diffalign.evaluation.evaluate import compare, evaluate
from diffalign.evaluation.relabel import RelabelConfig
from diffalign.evaluation.relabel import run as relabel
from diffalign.evaluation.score import ScoreConfig
from diffalign.evaluation.score import run as score
from diffalign.evaluation.settings import EvaluationConfig
from diffalign.forecast.dry_run import dry_run
from diffalign.runtime.exits import CannotTrain, NotFinite, OutOfMemory, SaveFailed
from diffalign.runtime.memory import is_out_of_memory
from diffalign.runtime.output import steady_output
from diffalign.runtime.signals import exit_on_signals
from diffalign.runtime.watchdog import Watchdog
from diffalign.trainers.diffusion_dpo import DiffusionDPOTrainer
from diffalign.trainers.diffusion_dpo_config import DiffusionDPOConfig
from diffalign.trainers.flow_grpo import FlowGRPOTrainer
from diffalign.trainers.flow_grpo_config import FlowGRPOConfig
from diffalign.trainers.refl import ReFLTrainer
from diffalign.trainers.refl_config import ReFLConfig

TRAINERS: dict[str, tuple[type, type]] = {
    "diffusion_dpo": (DiffusionDPOConfig, DiffusionDPOTrainer),
    "flow_grpo": (FlowGRPOConfig, FlowGRPOTrainer),
    "refl": (ReFLConfig, ReFLTrainer),
}
DRY_RUN = "--dry_run"
USAGE = """usage: diffalign train TRAINER --config FILE.yaml [--field VALUE ...] [--dry_run]
       diffalign eval MODEL ... [--field VALUE ...]      figures: rewards, win rates, tasks, diversity
       diffalign compare MODEL ... [--field VALUE ...]   pictures: compare.png and compare.html
       diffalign score IMAGES ... --rewards NAME [--field VALUE ...]   rewards of pictures; --serve PORT offers them
       diffalign check DATA ... [--field VALUE ...]      what is wrong with pairs or prompts; 1 if a run would stop
       diffalign relabel DATA ... --rewards NAME [--field VALUE ...]   AI labels, stored beside the data
       diffalign doctor [--field VALUE ...]              what works on this machine; 1 if something does not

trainers: {trainers}
models: run folders, checkpoints, LoRA files, full weights; NAME=PATH names one, PATH@0.5 scales a LoRA
images: files, folders, .parquet or .jsonl files
data: .parquet, .arrow, .jsonl, .json or .csv files, folders of pairs, rollout buffers, hub ids; for check also files
      of prompts: .txt, or .jsonl with --prompts
help on the fields: diffalign train TRAINER --help, and eval, compare, score, check, relabel or doctor --help"""


def use_all_cores() -> None:
    """Gives each local process its share of the cores: ``accelerate launch`` would leave one thread to each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def train(argv: Sequence[str]) -> int | None:
    """``diffalign train TRAINER ...``: resolves the configuration and runs the trainer, or says what it would do."""
    if not argv or argv[0] not in TRAINERS:
        raise ValueError(f"name a trainer: {', '.join(TRAINERS)}")
    config, trainer = TRAINERS[argv[0]]
    if "--help" in argv or "-h" in argv:
        print(f"--dry_run\n    print configuration, batches, model evaluations, memory and time; write nothing\n"
              f"{describe(config)}")  # fmt: skip
        return None
    use_all_cores()
    options = [token for token in argv[1:] if token != DRY_RUN]
    args = parse(config, options)
    if len(options) < len(argv) - 1:
        return dry_run(argv[0], args, trainer)
    exit_on_signals()  # while a model loads there is nothing to save; the run has handlers of its own
    with Watchdog(args.hang_timeout, args.output_dir, loading=True):
        made = trainer(args=args)
    made.train()
    return None


def judge(config_class: type, field: str, run: Callable[[Any], object], argv: Sequence[str]) -> object:
    """``diffalign eval|compare MODEL ...``, ``diffalign score IMAGES ...``: what goes into ``field``, then fields."""
    if "--help" in argv or "-h" in argv:
        print(describe(config_class))
        return None
    first = next((i for i, token in enumerate(argv) if token.startswith("--")), len(argv))
    config = parse(config_class, argv[first:])
    use_all_cores()
    return run(dataclasses.replace(config, **{field: (*argv[:first], *getattr(config, field))}))


def doctor(argv: Sequence[str]) -> int | None:
    """``diffalign doctor``: tries what a training needs on this machine."""
    if "--help" in argv or "-h" in argv:
        print(describe(DoctorConfig))
        return None
    config = parse(DoctorConfig, argv)
    use_all_cores()
    return examine(config, TRAINERS)


COMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "train": train,
    "eval": partial(judge, EvaluationConfig, "models", evaluate),
    "compare": partial(judge, EvaluationConfig, "models", compare),
    "score": partial(judge, ScoreConfig, "images", score),
    "check": partial(judge, CheckConfig, "data", check),
    "relabel": partial(judge, RelabelConfig, "data", relabel),
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: see ``_main``. Its output may go where nobody reads it."""
    with steady_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    """Runs a command; 2 for what the user can mend, said in one line, 1 where ``check`` or ``doctor`` found faults.

    A run that was stopped gives 143 or 130, one that cannot go on the exit code of its error (``runtime.exits``).
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(USAGE.format(trainers=", ".join(TRAINERS)))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as python -m does, so that a reward module:function is found beside the run
    try:
        code = COMMANDS[argv[0]](argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"diffalign: {error}", file=sys.stderr)
        return 2
    except (SaveFailed, NotFinite, OutOfMemory, CannotTrain) as error:
        print(f"diffalign: {error}", file=sys.stderr)
        return error.exit_code
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"diffalign: out of memory: {str(error)[:300]}: try a smaller model, resolution or lora.rank, "
              "base_precision: bf16, or offload: [text_encoders, vae]", file=sys.stderr)  # fmt: skip
        return OutOfMemory.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code if isinstance(code, int) else 0
