"""``diffalign completion SHELL``: a script that completes commands, trainers and options in bash and zsh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffalign.config.schema import leaves
from diffalign.lazy import load
from diffalign.trainers import registry

SHELLS = ("bash", "zsh")
WITH_TRAINER = ("train", "fit", "schema")
SCRIPT = """\
_diffalign() {
    local word=${COMP_WORDS[COMP_CWORD]} first=${COMP_WORDS[1]} second=${COMP_WORDS[2]} words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="%(commands)s"
    elif [ "$COMP_CWORD" = 2 ]; then
        case $first in
%(seconds)s
        esac
    fi
    if [ "${word#-}" != "$word" ]; then
        case "$first $second" in
%(options)s
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _diffalign diffalign
"""


def run(argv: Sequence[str], commands: Mapping[str, str]) -> None:
    """Print the script of a shell.

    Args:
        argv: Name of the shell.
        commands: Name of each command -> import path of its configuration class, "" for none.

    Raises:
        ValueError: No such shell.
    """
    if list(argv) not in [[shell] for shell in SHELLS]:
        raise ValueError("name a shell: source <(diffalign completion bash), or zsh, in its start file")
    if argv[0] == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(script(commands), end="")


def script(commands: Mapping[str, str]) -> str:
    """Return the script of bash, with the options of every command and trainer in it."""
    trainers = registry.trainer_names()
    cases = {f"{name} {trainer}": registry.config_class(trainer) for name in ("train", "fit") for trainer in trainers}
    cases |= {f"{name} *": load(path) for name, path in commands.items() if path}
    seconds: dict[str, Sequence[str]] = {
        "|".join(WITH_TRAINER): trainers,
        "configs": ["copy", "path"],
        "completion": SHELLS,
    }
    options = {case: [f"--{leaf.path}" for leaf in leaves(kind)] for case, kind in cases.items()}
    for case, own in options.items():
        own += ["--config", "--help", *(["--dry_run"] if case.startswith("train ") else [])]
    return SCRIPT % {
        "commands": " ".join(commands),
        "seconds": _cases(seconds, " " * 12),
        "options": _cases({_quoted(case): own for case, own in options.items()}, " " * 12),
    }


def _quoted(case: str) -> str:
    """Quote a pattern but for its star."""
    return f'"{case.removesuffix("*")}"' + "*" * case.endswith("*")


def _cases(words: Mapping[str, Sequence[str]], indent: str) -> str:
    return "\n".join(f'{indent}{pattern}) words="{" ".join(own)}" ;;' for pattern, own in words.items())
