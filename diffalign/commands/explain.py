"""``diffalign explain KEY``: what an option does, its default, and what presets and configurations set it to.

A metric of ``metrics.jsonl`` is explained too, and ``metrics`` lists those to watch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from typing import Any

from diffalign.config import load_yaml, yaml_dialect
from diffalign.config.ranges import ANY
from diffalign.config.schema import Leaf, leaves, type_name
from diffalign.config.unread import plain
from diffalign.diffusion import plan, reward_gradient_presets
from diffalign.embedded import config_file, config_names
from diffalign.report import metrics
from diffalign.trainers import registry
from diffalign.trainers.forward_rl import presets as forward_presets

USAGE = "write diffalign explain KEY, such as learning_rate, plan.num_steps, eval/diversity or metrics"
LEGEND = "metrics"


def run(argv: Sequence[str]) -> None:
    """Print what is known of an option or a metric. ValueError: none of that name."""
    if len(argv) != 1:
        raise ValueError(f"explain takes one option or metric: {USAGE}")
    print("\n".join(explained(argv[0].lstrip("-"))))


def explained(key: str) -> Iterator[str]:
    """Yield the lines about an option, a metric, or both if they share the name."""
    if key == LEGEND:
        yield from metrics.legend()
        return
    options = _options()
    found = {name: own[key] for name, own in options.items() if key in own}
    metric = metrics.explained(key)
    if not (found or metric):
        every = sorted({path for own in options.values() for path in own} | {one.name for one in metrics.METRICS})
        close = [path for path in every if path.rpartition(".")[2] == key] or difflib.get_close_matches(key, every, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`diffalign train TRAINER --help` lists all"
        raise ValueError(f"no trainer has an option or a metric {key[:60]!r}; {hint}")

    yield from metric
    for leaf, names in _alike(found):
        default = "required" if leaf.default is MISSING else f"default {_shown(leaf.default)}"
        limits = f", {leaf.range}" if str(leaf.range) != str(ANY) else ""
        yield f"{key}: {type_name(leaf.hint)}{limits}; {default} ({', '.join(names)})"
        yield f"  {leaf.help}"
    if methods := method_presets(key):
        yield from _table("presets of methods", methods)
    for name in found:
        if values := configured(name, key):
            yield from _table(f"configs/{name}", values)


@cache
def _options() -> dict[str, dict[str, Leaf]]:
    """Return the options of each trainer, by name."""
    kinds = {name: registry.config_class(name) for name in registry.trainer_names()}
    return {name: {leaf.path: leaf for leaf in leaves(kind)} for name, kind in kinds.items()}


def _alike(found: Mapping[str, Leaf]) -> list[tuple[Leaf, list[str]]]:
    """Group trainers whose option has the same type, default and help."""
    groups: dict[str, tuple[Leaf, list[str]]] = {}
    for name, leaf in found.items():
        same = repr((type_name(leaf.hint), leaf.default, leaf.help, str(leaf.range)))
        groups.setdefault(same, (leaf, []))[1].append(name)
    return list(groups.values())


def method_presets(key: str) -> dict[str, Any]:
    """Return the value of an option in each preset of a method that has it: of plans, recipes, or forward RL."""
    section, _, name = key.rpartition(".")
    if section == "plan":
        return {preset: row.options[name] for preset, row in plan.PRESETS.items() if name in row.options}
    if section == "recipe":
        recipes = {preset: reward_gradient_presets.resolve(preset, {}) for preset in reward_gradient_presets.PRESETS}
        return {preset: getattr(row, name) for preset, row in recipes.items() if hasattr(row, name)}
    if key not in {field.name for field in dataclasses.fields(forward_presets.Method)}:
        return {}
    return {preset: getattr(row, key) for preset, row in forward_presets.PRESETS.items()}


def configured(trainer: str, key: str) -> dict[str, Any]:
    """Return the value that each configuration of a trainer sets an option to."""
    found = {}
    for name, value in _files(trainer).items():
        for part in key.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        if value is not MISSING:
            found[name] = value
    return found


@cache
def _files(trainer: str) -> dict[str, Any]:
    """Read the configurations of a trainer, by name."""
    names = (name for name, _ in config_names() if name.startswith(f"{trainer}/"))
    return {name.partition("/")[2]: load_yaml(config_file(name)) for name in names}


def _table(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line per value, with the names that have it."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(_shown(value), []).append(name)
    yield f"{title}:"
    width = min(24, max(map(len, by_value)))
    yield from (f"  {value:{width}}  {', '.join(names)}" for value, names in by_value.items())


def _shown(value: Any) -> str:
    return yaml_dialect.dump_inline(plain(value))
