"""Hostile numbers for every numeric field of every configuration."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from diffalign.commands.check import CheckConfig
from diffalign.commands.evaluate_config import EvaluationConfig
from diffalign.commands.relabel import RelabelConfig
from diffalign.commands.score import ScoreConfig
from diffalign.config import from_dict, to_dict
from diffalign.config.schema import arms_of, leaves
from diffalign.data.config import PreferenceDataConfig
from diffalign.rewards.config import RewardConfig
from tests.reliability.trainers import TRAINERS, short

NUMBERS: dict[str, Any] = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "0": 0,
    "negative": -3,
    "huge": 10**18,
    "2**70": 2**70,
    "huge float": 1e300,
    "tiny": 1e-300,
}
# No trainer, but read the same way.
OTHERS = {"eval": EvaluationConfig, "score": ScoreConfig, "check": CheckConfig, "relabel": RelabelConfig}
OTHERS |= {"reward": RewardConfig, "data": PreferenceDataConfig}


def _numeric(hint: Any) -> list[type]:
    """The number types that a value of this annotation may have, or its items."""
    found = []
    for arm in arms_of(hint):
        inner = [item for part in typing.get_args(arm) for item in arms_of(part)]
        found += [kind for kind in (arm, *inner) if kind in (int, float)]
    return found


def _shaped(hint: Any, number: Any) -> Any:
    """A number as a field of this annotation takes it: alone, in a list or in a table."""
    for arm in arms_of(hint):
        origin, arguments = typing.get_origin(arm), typing.get_args(arm)
        if origin is dict:
            return {"brightness": number}
        if origin in (tuple, list):
            return [number] if arguments[1:] == (...,) else [number] * len(arguments)
    return number


def fields(config: type) -> Iterator[tuple[str, Any]]:
    """Dotted path and annotation of each numeric option."""
    return ((leaf.path, leaf.hint) for leaf in leaves(config) if _numeric(leaf.hint))


def cases(config: type) -> Iterator[tuple[str, str, Any]]:
    """(dotted path, name of the number, value) for each numeric option and each number of its type."""
    for path, hint in fields(config):
        for name, number in NUMBERS.items():
            if isinstance(number, int) or float in _numeric(hint):
                value = float(number) if isinstance(number, int) and int not in _numeric(hint) else number
                yield path, name, _shaped(hint, value)


def with_value(mapping: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a configuration as plain values, with one of them replaced."""
    first, _, rest = path.partition(".")
    inner = mapping.get(first)
    changed = with_value(inner if isinstance(inner, dict) else {}, rest, value) if rest else value
    return {**mapping, first: changed}


def mapping_of(name: str, folder: Any, path: str, value: Any) -> dict[str, Any]:
    """The plain configuration of a short run of a trainer, with one value replaced."""
    return with_value(to_dict(short(name, folder)), path, value)


def made(name: str, folder: Any, path: str, value: Any) -> Any:
    """The configuration, read and validated as the command line does it."""
    args = from_dict(TRAINERS[name].config, mapping_of(name, folder, path, value), "hostile.yaml")
    args.validate()
    return args


def from_python(name: str, folder: Any, path: str, value: Any) -> Any:
    """The same, where a number was assigned in Python and no reader has seen it."""
    args = copy.deepcopy(short(name, folder))  # sections are shared between configurations
    first, _, rest = path.partition(".")
    if rest:
        sections = rest.split(".")
        inner = getattr(args, first)
        for section in sections[:-1]:
            inner = getattr(inner, section)
        object.__setattr__(inner, sections[-1], value)
        args = dataclasses.replace(args)
    else:
        setattr(args, first, value)
    args.validate()
    return args
