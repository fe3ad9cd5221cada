"""The ``diffalign`` command: dispatch only. What a command needs is imported when it runs."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.config import describe, parse
from diffalign.console import closing_pipes, one_line_logs, one_line_warnings
from diffalign.lazy import load
from diffalign.messages import bounded, explain
from diffalign.preflight import inspect
from diffalign.runtime.output import steady_output
from diffalign.trainers import registry
from diffalign.trainers.registry import unknown

HELP = ("--help", "-h")
DRY_RUN = "dry_run"
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
lists: --rewards a,b or '[a, b]', or the option twice; weights (train): --rewards a=1,b=0.5 or '{{a: 1, b: 0.5}}'
help on the fields: diffalign train TRAINER --help, and eval, compare, score, check, relabel or doctor --help"""


def use_all_cores() -> None:
    """Give each local process its share of the cores: ``accelerate launch`` would leave one thread to each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def train(argv: Sequence[str]) -> int | None:
    """``diffalign train TRAINER ...``: resolve the configuration, then train, or print what training would do."""
    if not argv or argv[0] in HELP:
        raise ValueError(unknown())
    config_class = registry.config_class(argv[0], allow_code=True)  # code is typed here, which is consent
    if _asks_for_help(argv):
        switch = "print configuration, batches, model evaluations, memory and time; write nothing"
        print(f"--{DRY_RUN}\n    {switch}\n{describe(config_class)}")
        return None
    dry, options = take_switch(argv[1:], DRY_RUN)
    args = parse(config_class, options)
    inspect(args, weights=not dry)
    use_all_cores()
    one_line_logs()
    entry = registry.find_algorithm(argv[0], allow_code=True)
    if dry:
        with closing_pipes():
            return load("diffalign.forecast.dry_run:dry_run")(entry, args)
    # While a model loads there is nothing to save; the run has handlers of its own.
    load("diffalign.runtime.signals:exit_on_signals")()
    with load("diffalign.runtime.watchdog:Watchdog")(args.hang_timeout, args.output_dir, loading=True):
        trainer = entry.trainer(args=args)
    trainer.train()
    return None


def take_switch(argv: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Take ``--name``, with or without a truth value, out of the options; the last one counts.

    ValueError: a value that is none.
    """
    from diffalign.config.schema import truth

    rest, found, tokens = [], False, list(argv)
    while tokens:
        token = tokens.pop(0)
        key, equals, text = token.partition("=")
        if key != f"--{name}":
            rest.append(token)
            continue
        if not equals:
            text = tokens.pop(0) if tokens and not tokens[0].startswith("--") else "true"
        if (value := truth(text)) is None:
            raise ValueError(f"command line: {name}: expected bool, got {text!r}: write --{name}, or --{name} false")
        found = value
    return found, rest


@dataclass(frozen=True)
class Command:
    """A command besides ``train``. positional: the field that receives what belongs to no option."""

    config: str
    run: str
    positional: str | None = None

    def __call__(self, argv: Sequence[str]) -> object:
        """Read the options, check what they name, and run."""
        config_class = load(self.config)
        if _asks_for_help(argv):
            print(describe(config_class))
            return None
        config = parse(config_class, argv, self.positional)
        inspect(config, weights=True)
        use_all_cores()
        one_line_logs()
        return load(self.run)(config)


def schema(argv: Sequence[str]) -> None:
    """``diffalign schema TRAINER``: print the JSON Schema of its configuration."""
    if len(argv) != 1:
        raise ValueError(f"{unknown()}: diffalign schema flow_grpo")
    print(load("diffalign.config.json_schema:schema_text")(registry.config_class(argv[0], allow_code=True)), end="")


EVALUATION = "diffalign.commands.evaluate_config:EvaluationConfig"
COMMANDS: Mapping[str, Callable[[Sequence[str]], object]] = {
    "train": train,
    "eval": Command(EVALUATION, "diffalign.commands.evaluate:evaluate", "models"),
    "compare": Command(EVALUATION, "diffalign.commands.evaluate:compare", "models"),
    "score": Command("diffalign.commands.score_config:ScoreConfig", "diffalign.commands.score:run", "images"),
    "check": Command("diffalign.commands.check_config:CheckConfig", "diffalign.commands.check:run", "data"),
    "relabel": Command("diffalign.commands.relabel_config:RelabelConfig", "diffalign.commands.relabel:run", "data"),
    "doctor": Command("diffalign.commands.doctor.config:DoctorConfig", "diffalign.commands.doctor.command:run"),
    "schema": schema,
}


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(token in HELP for token in argv)


def _closest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for what the user can fix, printed in a line or a list, 1 where ``check`` or ``doctor`` fail.

    A run that was stopped gives 143 or 130, one that cannot go on the exit code of its error (``runtime.errors``). A
    reader that leaves, as ``| head``, ends every command but a training, with 141 and without a message.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        with closing_pipes():
            if argv and argv[0] == "--version":
                print(load("diffalign:__version__"))
                return 0
            print(USAGE.format(trainers=", ".join(registry.algorithm_names())))
        if argv and argv[0] not in HELP:
            print(f"diffalign: there is no command {argv[0]!r}{_closest(argv[0], COMMANDS)}", file=sys.stderr)
        return 0 if argv and argv[0] in HELP else 2
    trains = argv[0] == "train" and not _asks_for_help(argv)
    with one_line_warnings(), steady_output() if trains else closing_pipes():
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    """Run the command of ``argv``, and print what is wrong in a sentence."""
    try:
        code = COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
        # Code of the user's, such as a reward's constructor; the command itself ends by returning.
        print("diffalign: something called sys.exit() before the work was done; nothing was finished", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        if (text := explain(error)) is not None:
            print(f"diffalign: {text}", file=sys.stderr)
            return getattr(error, "exit_code", 2)
        if not load("diffalign.runtime.oom:is_out_of_memory")(error):
            raise
        print(
            bounded(
                f"diffalign: out of memory: {str(error)[:300]}: try a smaller model, resolution or lora.rank, "
                "base_precision: bf16, or offload: [text_encoders, vae]"
            ),
            file=sys.stderr,
        )
        return load("diffalign.runtime.errors:OutOfMemory").exit_code
    return code if isinstance(code, int) else 0
