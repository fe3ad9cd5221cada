"""The ``diffalign`` command: parse the command line and dispatch; commands import their code when they run."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from diffalign.config import describe, parse
from diffalign.console import closing_pipes, one_line_logs, one_line_warnings
from diffalign.lazy import load
from diffalign.messages import bounded, explain
from diffalign.preflight import inspect, not_needed_to_forecast
from diffalign.runtime.output import steady_output
from diffalign.trainers import registry
from diffalign.trainers.registry import unknown

HELP = ("--help", "-h")
DRY_RUN = "dry_run"
NOTES = """\
trainers: {trainers}
models: run folders, checkpoints, LoRA files, full weights; NAME=PATH names one, PATH@0.5 scales a LoRA
images: files, folders, .parquet or .jsonl files
data: .parquet, .arrow, .jsonl, .json or .csv files, folders of pairs, rollout buffers, hub ids; for check also files
      of prompts: .txt, or .jsonl with --prompts
lists: --rewards a,b or '[a, b]', or the option twice; weights (train): --rewards a=1,b=0.5 or '{{a: 1, b: 0.5}}'

diffalign train TRAINER --help and diffalign COMMAND --help list all options"""
# Command -> its arguments, and what it does.
SUMMARIES = {
    "train": ("TRAINER --config FILE.yaml [--field VALUE ...] [--dry_run]", "train; --dry_run prints what it would do"),
    "eval": ("MODEL ... [--field VALUE ...]", "compute rewards, win rates, results per task and diversity"),
    "compare": ("MODEL ... [--field VALUE ...]", "write compare.png and compare.html"),
    "bench": (
        "NAME MODEL ... [--field VALUE ...]",
        "run a benchmark (GenEval, DPG-Bench ...) beside published figures",
    ),
    "rank": ("MODEL ... --rewards NAME [--field VALUE ...]", "keep the best of n images; write data for SFT and DPO"),
    "score": ("IMAGES ... --rewards NAME [--field VALUE ...]", "score images; --serve PORT serves rewards over HTTP"),
    "check": ("DATA ... [--field VALUE ...]", "check pairs or prompts; exit with 1 if a run would stop"),
    "label": ("SOURCE ... [--field VALUE ...]", "compare pairs in a browser; answers become preference data"),
    "export": (
        "MODEL ... --format FORMAT [--field VALUE ...]",
        "write a LoRA for ComfyUI, diffusers or peft, or merged",
    ),
    "relabel": ("DATA ... --rewards NAME [--field VALUE ...]", "label pairs with rewards, stored beside the data"),
    "fit": ("TRAINER --config FILE.yaml [--field VALUE ...]", "print settings that fit into 12 to 80 GB of memory"),
    "doctor": ("[--field VALUE ...]", "check this machine; exit with 1 if something does not work"),
    "configs": ("[copy NAME [FILE] | path NAME]", "list the configurations of the package; copy one to edit"),
    "explain": ("KEY", "say what an option does, with its defaults and presets, or what a metric means"),
    "completion": ("bash|zsh", "print a script that completes commands and options in a shell"),
    "schema": ("TRAINER", "print the JSON Schema of a trainer's configuration"),
}


def use_all_cores() -> None:
    """Give each local process its share of the cores, unless the user set OMP_NUM_THREADS.

    ``accelerate launch`` sets OMP_NUM_THREADS to 1 by itself, which would leave one thread to each process.
    """
    launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if "OMP_NUM_THREADS" in os.environ and not launched:
        return
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def train(argv: Sequence[str]) -> int | None:
    """``diffalign train TRAINER ...``: resolve the configuration, then train, or print what training would do."""
    if not argv:
        raise ValueError(unknown())
    config_class = registry.config_class(argv[0], allow_code=True)  # code is typed here, which is consent
    if _asks_for_help(argv):
        switch = (
            "print configuration, batches, model evaluations, memory and time, without weights; write nothing; "
            "--world N and --card NAME (h100, a100, 4090 ...) forecast N processes on that card"
        )
        print(describe(config_class, {DRY_RUN: switch}))
        return None
    dry, options = take_switch(argv[1:], DRY_RUN)
    world, card, options = _take_place(options) if dry else (None, None, options)
    args = parse(config_class, options)
    inspect(args, weights=not dry, skip=_not_read(args) if dry else ())
    use_all_cores()
    one_line_logs()
    entry = registry.find_algorithm(argv[0], allow_code=True)
    if dry and entry.plan:
        with closing_pipes():
            return load(entry.plan)(args, load("diffalign.forecast.dry_run:place_of")(world, card))
    memory = getattr(args, "memory", None)
    place = load("diffalign.forecast.dry_run:place_of")(world, card) if dry or memory else None
    if memory:
        print(f"memory {memory}: rehearsing settings, about a minute", file=sys.stderr)
        args, chosen, place = load("diffalign.forecast.fit:choose")(entry, args, place, dry=dry)
        print(chosen, file=sys.stderr)
    if dry:
        with closing_pipes():
            return load("diffalign.forecast.dry_run:dry_run")(entry, args, place, timed=world is None)
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


def _not_read(config: Any) -> tuple[str, ...]:
    """Return the fields of which a forecast reads nothing: prompts, and the model if the package has its configs."""
    if backbone := getattr(config, "backbone", None):
        return ("backbone",) if load("diffalign.models.published_configs:published_reward_folder")(backbone) else ()
    if not (model := getattr(config, "model", None)):
        return not_needed_to_forecast(config)
    try:
        base = load("diffalign.models.single_file:layout")(model)
    except (ValueError, OSError):  # the check of the model says what is wrong
        return not_needed_to_forecast(config)
    known = load("diffalign.models.published_configs:published_folder")(base)
    return (*(("model",) if known else ()), *not_needed_to_forecast(config))


def _take_place(options: Sequence[str]) -> tuple[int | None, str | None, list[str]]:
    """Take ``--world N`` and ``--card NAME`` of a dry run out of the options. ValueError: N is no positive number."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--world")
    parser.add_argument("--card")
    try:
        found, rest = parser.parse_known_args(list(options))
    except argparse.ArgumentError as error:
        raise ValueError(f"command line: {error}: write --dry_run --world 8 --card h100") from error
    if found.world is None:
        return None, found.card, rest
    if not found.world.isdecimal() or not 0 < int(found.world) <= 100_000:
        raise ValueError(f"command line: --world {found.world[:40]!r} is no number of processes: write --world 8")
    return int(found.world), found.card, rest


@dataclass(frozen=True)
class Command:
    """A command besides ``train``.

    Attributes:
        config: Import path of its configuration class.
        run: Import path of its function.
        positional: Field for arguments that belong to no option.
        skip: Fields that the command checks itself.
    """

    config: str
    run: str
    positional: str | None = None
    skip: tuple[str, ...] = ()

    def __call__(self, argv: Sequence[str]) -> object:
        """Read the options, check the files and names in them, and run."""
        config_class = load(self.config)
        if _asks_for_help(argv):
            print(describe(config_class))
            return None
        config = parse(config_class, argv, self.positional)
        computes = getattr(config, "computes", True)
        inspect(config, weights=computes, skip=self.skip)
        if computes:
            use_all_cores()
            one_line_logs()
        return load(self.run)(config)


@dataclass(frozen=True)
class NamedCommand(Command):
    """A command whose first argument is a name.

    Attributes:
        named: Field for it.
    """

    named: str = ""

    def __call__(self, argv: Sequence[str]) -> object:
        """Take the name, then do as other commands."""
        named = [f"--{self.named}", argv[0], *argv[1:]] if argv and not argv[0].startswith("-") else argv
        return super().__call__(named)


def fit(argv: Sequence[str]) -> None:
    """``diffalign fit TRAINER ...``: print which settings fit a run into the memory of several cards."""
    if not argv:
        raise ValueError(unknown())
    config_class = registry.config_class(argv[0], allow_code=True)
    if _asks_for_help(argv):
        print(describe(config_class))
        return
    if argv[0] in registry.JUDGES:
        raise ValueError(f"fit is of diffusion models, not of `train {argv[0]}`: lower its train_batch_size instead")
    args = parse(config_class, argv[1:])
    inspect(args, skip=_not_read(args))
    use_all_cores()
    one_line_logs()
    load("diffalign.forecast.fit:show_table")(registry.find_algorithm(argv[0], allow_code=True), args)


def schema(argv: Sequence[str]) -> None:
    """``diffalign schema TRAINER``: print the JSON Schema of its configuration."""
    if len(argv) != 1:
        raise ValueError(f"{unknown()}: diffalign schema flow_grpo")
    print(load("diffalign.config.json_schema:schema_text")(registry.config_class(argv[0], allow_code=True)), end="")


def explain_option(argv: Sequence[str]) -> None:
    """``diffalign explain KEY``: say what an option does."""
    load("diffalign.commands.explain:run")(argv)


def completion(argv: Sequence[str]) -> None:
    """``diffalign completion bash``: print what completes commands and options."""
    configs = {name: getattr(command, "config", "") for name, command in COMMANDS.items()}
    load("diffalign.commands.completion:run")(argv, configs)


def configs(argv: Sequence[str]) -> None:
    """``diffalign configs``: list the configurations of the package, or copy one."""
    load("diffalign.commands.configs:run")(argv)


EVALUATION = "diffalign.commands.evaluate_config:EvaluationConfig"
COMMANDS: Mapping[str, Callable[[Sequence[str]], object]] = {
    "train": train,
    "eval": Command(EVALUATION, "diffalign.commands.evaluate:evaluate", "models"),
    "compare": Command(EVALUATION, "diffalign.commands.evaluate:compare", "models"),
    "bench": NamedCommand(
        "diffalign.commands.bench.config:BenchConfig",
        "diffalign.commands.bench.command:run",
        "models",
        ("prompts",),
        "benchmark",
    ),
    "rank": Command("diffalign.commands.rank_config:RankConfig", "diffalign.commands.rank:run", "models"),
    "score": Command("diffalign.commands.score_config:ScoreConfig", "diffalign.commands.score:run", "images"),
    "check": Command("diffalign.commands.check_config:CheckConfig", "diffalign.commands.check:run", "data"),
    "label": Command("diffalign.commands.label.config:LabelConfig", "diffalign.commands.label.command:run", "models"),
    "relabel": Command("diffalign.commands.relabel_config:RelabelConfig", "diffalign.commands.relabel:run", "data"),
    # A published model needs no weights, so that the command looks for the model itself.
    "export": Command(
        "diffalign.commands.export_config:ExportConfig", "diffalign.commands.export:run", "models", ("model",)
    ),
    "fit": fit,
    "doctor": Command("diffalign.commands.doctor.config:DoctorConfig", "diffalign.commands.doctor.command:run"),
    "configs": configs,
    "explain": explain_option,
    "completion": completion,
    "schema": schema,
}


DESCRIBED_HERE = (
    "train",
    "fit",
    "configs",
    "explain",
    "completion",
    "schema",
)  # without a trainer they have no options to list


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors name the closest command."""

    def error(self, message: str) -> NoReturn:
        """Print the help, what is wrong and the closest command; exit with 2."""
        given = re.search(r"invalid choice: (['\"])(.*)\1 \(choose", message, re.S)
        what = f"there is no command {given[2]!r}{_closest(given[2], COMMANDS)}" if given else message
        self.exit(2, f"{self.format_help()}\n{self.prog}: {bounded(what)}\n")


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of ``--help``, ``--version`` and the commands; their options are none of its own."""
    notes = NOTES.format(trainers=", ".join(registry.trainer_names()))
    style: Any = argparse.RawDescriptionHelpFormatter
    summary = "Preference fine-tuning of diffusion and flow models."
    parser = CommandParser("diffalign", description=summary, epilog=notes, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=load("diffalign:__version__"))
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name in COMMANDS:
        arguments, what = SUMMARIES[name]
        about: dict[str, Any] = {
            "usage": f"diffalign {name} {arguments}",
            "help": what,
            "description": what,
            "epilog": notes,
        }
        commands.add_parser(name, formatter_class=style, add_help=name in DESCRIBED_HERE, **about)
    return parser


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
    with closing_pipes():
        # argparse sees the command alone: what follows is read by the configuration class of the command.
        described = argv[:2] if len(argv) > 1 and argv[0] in DESCRIBED_HERE and argv[1] in HELP else argv[:1]
        try:
            parser = command_parser()
            parser.parse_args(described)
            if not argv:
                parser.error("name a command")
        except SystemExit as stopped:  # --help, --version, or no such command
            return int(stopped.code or 0)
    trains = argv[0] == "train" and not _asks_for_help(argv)
    with one_line_warnings(), steady_output() if trains else closing_pipes():
        try:
            code = COMMANDS[argv[0]](argv[1:])
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if (exit_code := _report(error)) is None:
                raise
            return exit_code
    return code if isinstance(code, int) else 0


def _report(error: BaseException) -> int | None:
    """Print what is wrong in a sentence; return the exit code, or None for an error that needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        if error.code not in (None, 0):
            return None
        # User code, such as a reward's constructor: the command itself ends by returning.
        print("diffalign: something called sys.exit() before the work was done; nothing was finished", file=sys.stderr)
        return 1
    if isinstance(error, BrokenPipeError):
        return None
    assert isinstance(error, Exception)
    if (text := explain(error)) is not None:
        print(f"diffalign: {text}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, ImportError) and (error.name or "torch") == "torch" and "torch" not in sys.modules:
        print(f"diffalign: torch cannot be imported: {error}: try pip install torch", file=sys.stderr)
        return 2
    if not load("diffalign.runtime.oom:is_out_of_memory")(error):
        return None
    advice = "try a smaller model, resolution or lora.rank, base_precision: bf16, or offload: [text_encoders, vae]"
    print(bounded(f"diffalign: out of memory: {str(error)[:300]}: {advice}"), file=sys.stderr)
    return int(load("diffalign.runtime.errors:OutOfMemory").exit_code)
