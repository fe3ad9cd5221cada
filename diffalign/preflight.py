"""Check that the files, models, data sets and rewards of a configuration exist, before anything loads."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import remote
from diffalign.config.held_out import PANEL, WORD
from diffalign.config.schema import ConfigError, shown
from diffalign.config.sections import PASSED
from diffalign.messages import hub_sentence, is_offline, offline_sentence
from diffalign.plugins import declared_names, entry_points

TIMEOUT = 10  # seconds for the hub to answer
PLUGINS = "diffalign.rewards"
FILE_SUFFIXES = frozenset({".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt", ".safetensors", ".tar"})
REWARD_FIELDS = ("rewards", "held_out", "eval_rewards")  # of a configuration, where it names no others
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def inspect(config: Any, weights: bool = False, skip: Collection[str] = ()) -> None:
    """Raise ConfigError with everything that a configuration names and that does not exist.

    Reads no file and loads no model; queries the hub for whether a repository can be read. weights: also look for the
    weights of rewards, which imports the rewards. skip: names of fields that nothing will be read from.
    """
    problems = list(dict.fromkeys(_problems(config, "", skip)))
    if weights and not problems:
        problems = list(weights_problems(config))
    if problems:
        raise ConfigError(problems)


def _problems(config: Any, prefix: str, skip: Collection[str] = ()) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{prefix}{field.name}.")
        elif field.name in CHECKS and field.name not in skip and value is not None and not isinstance(value, bool):
            yield from CHECKS[field.name](f"{prefix}{field.name}", value, config)
    if (own := getattr(config, "problems", None)) is not None:
        yield from own()


def path_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check that a file or folder exists."""
    path = Path(value)
    if address_like(value):
        if problem := remote.problem(value):
            yield f"{name}: {problem}"
    elif not path.exists():
        yield f"{name}: there is no file {path}{_near(path)}; check the path (relative to {Path.cwd()})"


def address_like(source: str | Path) -> bool:
    """Return whether a source is an fsspec address, valid or not."""
    try:
        return remote.address(source) is not None
    except remote.RemoteError:
        return True


def prompts_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check the name of prompts: a file that exists, a hub data set that can be read, or a known word."""
    from diffalign.data.prompt_source import HUB, parse_source

    path = Path(value)
    if path.is_dir():
        yield f"{name}: {path} is a folder; name a file of prompts in it, e.g. .txt, .jsonl, .csv or .parquet"
        return
    try:
        source = parse_source(value)
    except ValueError as error:
        # The name of a file that does not exist may well be misspelt in its suffix.
        yield from [f"{name}: {error}"] if path.exists() or not path.suffix else path_problem(name, path, config)
        return
    if source.path is not None:
        yield from path_problem(name, source.name, config)
    elif source.kind == HUB:
        for file in source.files or (None,):
            if problem := hub_problem(source.name, source.revision, "dataset", file):
                yield f"{name}: {problem}"
                return


def not_needed_to_forecast(config: Any) -> tuple[str, ...]:
    """List the fields that name data on the hub which a forecast does not read: it makes up its own."""
    from diffalign.data.prompt_source import HUB, parse_source

    found = []
    for name in ("train_prompts", "eval_prompts"):
        try:
            source = parse_source(getattr(config, name, None) or "")
        except ValueError:
            continue
        if source.kind == HUB and (name == "train_prompts" or source.count is not None):
            found.append(name)
    for name in ("train_data", "train_images"):
        sources = getattr(config, name, ())
        here = (not address_like(one) and (Path(one).exists() or _is_local(str(one))) for one in sources)
        if sources and not any(here):
            found.append(name)
    return tuple(found)


def model_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check a model: a folder in diffusers' layout, or a hub id."""
    text = str(value)
    if not text:
        return
    path = Path(text)
    if path.is_file() or (not path.is_dir() and text.partition("?")[0].endswith((".safetensors", ".ckpt"))):
        yield from _single_file_problem(text, config)
    elif path.exists():
        if not (path / "model_index.json").is_file():
            yield f"model {text}: has no model_index.json; give the folder that save_pretrained wrote"
    elif not HUB_ID.fullmatch(text) or text.startswith("."):
        yield f"model {text}: no such folder{_near(path)}; give a folder in diffusers' layout, or a hub id 'owner/name'"
    elif problem := hub_problem(text, getattr(config, "revision", None), "model", "model_index.json"):
        yield f"model {text}: no such folder{_near(path)}; {problem}"


def backbone_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check a CLIP or SigLIP model: a folder in transformers' layout, or a hub id."""
    text, path = str(value), Path(value or ".")
    if not text:
        return
    if path.exists():
        if not (path / "config.json").is_file():
            yield f"{name}: {text} has no config.json; give a folder that save_pretrained of transformers wrote"
    elif not HUB_ID.fullmatch(text) or text.startswith(".") or path.parent.is_dir():
        yield f"{name}: no such folder {text}{_near(path)}; give a CLIP or SigLIP model, a folder or a hub id"
    elif problem := hub_problem(text, getattr(config, "revision", None), "model", "config.json"):
        yield f"{name}: {problem}"


def _single_file_problem(text: str, config: Any) -> Iterator[str]:
    """Check a model that is a single file, and the base that has what the file lacks."""
    from diffalign.models.single_file import check_kind, header, layout, single_file

    try:
        found = single_file(text)
        if found is None:
            yield f"model {text}: is a file of another kind; give a folder in diffusers' layout, or a .safetensors file"
            return
        if (hub := found.on_hub) is not None:
            if problem := hub_problem(hub[0], hub[1], "model", hub[2]):
                yield f"model {text}: {problem}"
                return
        else:
            check_kind(found.name, header(found.path()))
        base = str(layout(text))
    except (ValueError, OSError) as error:
        yield str(error)
        return
    for problem in model_problem("model", base, config):
        yield (
            f"{problem}. {found.name} needs a base, for its configuration, its tokenizers and the parts that it lacks: "
            "FILE?base=FOLDER or ?base=owner/name"
        )


def lora_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check a LoRA: a file, a folder with one, or a hub id."""
    from diffalign.lora_source import find_lora, lora_file

    try:
        lora_file(find_lora(value))
    except (ValueError, OSError) as error:
        yield f"{name}: {error}"


def data_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check data sources: files, folders or hub ids."""
    for source in [value] if isinstance(value, (str, Path)) else value:
        path = Path(source)
        if getattr(config, "of_prompts", False):
            yield from prompts_problem(name, source, config)
            continue
        if address_like(source):
            yield from path_problem(name, source, config)
            continue
        if path.exists():
            continue
        if _is_local(str(source)):
            yield f"{name}: no preference data at {source}{_near(path)}: check the path (relative to {Path.cwd()})"
        elif problem := hub_problem(str(source), getattr(config, "revision", None), "dataset"):
            yield f"{name}: {problem}"


def _is_local(source: str) -> bool:
    """Return whether a source can only be a path, whether it exists or not."""
    path = Path(source)
    named = path.suffix.lower() in FILE_SUFFIXES or path.is_absolute() or not HUB_ID.fullmatch(source)
    return named or path.parent.is_dir()


def picture_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check that files and folders of images exist."""
    for source in value:
        if address_like(source):
            yield from path_problem(name, source, config)
        elif not Path(source).exists():
            yield f"nothing at {source}{_near(Path(source))}: check the path (relative to {Path.cwd()})"


def _judge_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check judges where they are rewards by name; those of a benchmark are named by what they answer."""
    if name in getattr(config, "reward_fields", ()):
        yield from reward_problem(name, value, config)


def reward_problem(name: str, value: Any, config: Any) -> Iterator[str]:
    """Check reward names: registered, or code in an existing file."""
    listed = [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value)
    if (problem := _blank_names(name, listed)) is not None:
        yield problem
        return
    table = value if isinstance(value, Mapping) else (getattr(config, "reward_options", None) or {})
    own = getattr(config, "rewards", None)
    elsewhere = own if isinstance(own, Mapping) and name != "rewards" else {}
    words = (WORD,) if name.endswith("held_out") else ()
    for one in (one for one in listed if one and one not in words):
        spec = getattr(table.get(one), "reward", "") or one
        if spec == PASSED or (one in elsewhere and spec == one):
            continue  # has an error of its own; or the training's own, by the name that it has there
        plain, equals, weight = str(spec).partition("=")
        if equals and hasattr(config, "reward_options") and not isinstance(value, Mapping):
            yield f"{name}: {shown(spec)} has a weight; write --{name} {plain} --reward_options '{{{plain}: {weight}}}'"
            continue
        where, colon, _ = str(spec).rpartition(":")
        if colon and where.endswith(".py") and not Path(where).is_file():
            yield f"{name}: reward {spec!r}: there is no file {where}; check the path"
        elif not colon and spec not in (known := known_rewards()):
            close = difflib.get_close_matches(spec, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            yield f"{name}: unknown reward {shown(spec)}; {hint}"


def _blank_names(name: str, listed: Sequence[str]) -> str | None:
    """Describe an empty name in a list of rewards, as ``--rewards ,`` gives; None if all have text."""
    if all(one.strip() for one in listed):
        return None
    text = shown(",".join(listed))
    if any(one.strip() for one in listed):
        return f"{name}: no name after a comma in {text}; write --{name} pickscore,hpsv2.1"
    return f"{name}: no reward is named in {text}; write --{name} pickscore, or --{name} pickscore,hpsv2.1"


def weights_problems(config: Any) -> Iterator[str]:
    """Find weights of registered rewards that are not available, without loading them."""
    from diffalign.rewards.base import registered
    from diffalign.rewards.support.weights import repositories_of

    seen = set()
    for spec, options in _reward_specs(config):
        try:
            found = repositories_of(registered(spec).make(**options))
        except (ValueError, ImportError):
            continue  # what is wrong with its options is for the command to say
        for source, revision in found:
            if source in seen or not HUB_ID.fullmatch(source) or Path(source).exists():
                continue
            seen.add(source)
            if problem := hub_problem(source, revision, "model"):
                yield f"reward {spec!r}: {problem}"


def _reward_specs(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List (registered name, options) of each reward that a configuration names."""
    options = getattr(config, "reward_options", None) or {}
    for field in getattr(config, "reward_fields", REWARD_FIELDS):
        value = getattr(config, field, None) or {}
        table = dict(value) if isinstance(value, Mapping) else {name: options.get(name) for name in value}
        if field == "held_out" and table.pop(WORD, None) is not None:
            table = {name: 1.0 for name in PANEL if name not in (getattr(config, "rewards", None) or {})} | table
        for name, entry in table.items():
            spec = getattr(entry, "reward", "") or name
            if ":" not in spec and spec in known_rewards():
                yield spec, getattr(entry, "options", {})


Check = Callable[[str, Any, Any], Iterator[str]]
# Fields of configurations that name what must be there. Others that are paths say where to write.
CHECKS: dict[str, Check] = {
    "model": model_problem,
    "init": lora_problem,
    "train_prompts": prompts_problem,
    "eval_prompts": prompts_problem,
    "prompts": prompts_problem,
    "train_rollouts": path_problem,
    "image_root": path_problem,
    "assets": path_problem,
    "train_data": data_problem,
    "train_images": data_problem,
    "data": data_problem,
    "images": picture_problem,
    "rewards": reward_problem,
    "eval_rewards": reward_problem,
    "held_out": reward_problem,
    "judges": _judge_problem,
    "backbone": backbone_problem,
    "eval_data": data_problem,
    "label_data": data_problem,
}


def known_rewards() -> list[str]:
    """List all reward names without importing rewards."""
    if (base := sys.modules.get("diffalign.rewards.base")) is not None:
        return list(base.names())
    return sorted({*declared_names("rewards", "register"), *entry_points(group=PLUGINS).names})


def hub_problem(repository: str, revision: str | None, kind: str, file: str | None = None) -> str | None:
    """Explain why a hub repository cannot be read; None if it can, or if the cache has it.

    Args:
        repository: ``owner/name``.
        revision: Branch, tag or commit.
        kind: ``model`` or ``dataset``.
        file: A file that it must contain.
    """
    if _is_cached(repository, kind):
        return None
    if is_offline():
        return offline_sentence(repr(repository))
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    try:
        if file is None:
            HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=TIMEOUT)
            HfApi().auth_check(repository, repo_type=kind)
        else:
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, repo_type=kind), timeout=TIMEOUT)
    except Exception as error:  # of the hub's client and of the HTTP client below it
        return hub_sentence(error, repository) or f"{repository!r} cannot be read: {type(error).__name__}: {error}"
    return None


def _is_cached(repository: str, kind: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    snapshots = cache / f"{kind}s--{repository.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir() and any(snapshots.iterdir()):
        return True
    data = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return kind == "dataset" and (data / repository.replace("/", "___")).is_dir()


def _near(path: Path) -> str:
    """Suggest a similar name in the same folder, as a question."""
    try:
        names: Sequence[str] = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
