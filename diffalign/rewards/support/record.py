"""Record rewards passed from Python in the form of a configuration, so that a run can be repeated."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.config.sections import PASSED
from diffalign.plugins import entry_points
from diffalign.rewards.base import PLUGINS, RECIPE, REWARDS, FunctionReward, Reward
from diffalign.rewards.config import RewardConfig
from diffalign.user_code import PREFIX

PLAIN = (str, int, float, bool, type(None))


def reward_record(spec: Any, rewards: Mapping[str, Reward]) -> dict[str, float | RewardConfig]:
    """Return the ``rewards`` section of a configuration that rebuilds the rewards of ``spec``.

    Args:
        spec: the argument ``reward_funcs``: a name, function or instance, a list of them, or weights by name.
        rewards: the rewards built from it, by name.

    Returns:
        A weight for a registered reward with default options; ``RewardConfig`` with ``module:name`` or
        ``file.py:name`` for code that can be imported by name; ``RewardConfig`` with ``PASSED`` for everything else
        (lambdas, local functions, instances).
    """
    if isinstance(spec, Mapping):
        return {name: entry if isinstance(entry, RewardConfig) else float(entry) for name, entry in spec.items()}
    several = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    code = {one.rpartition(":")[2]: one for one in several if isinstance(one, str) and ":" in one}
    return {name: _entry(name, reward, code) for name, reward in rewards.items()}


def passed_from_python(table: Mapping[str, Any]) -> list[str]:
    """List the rewards that a configuration cannot rebuild."""
    return [name for name, entry in table.items() if isinstance(entry, RewardConfig) and entry.reward == PASSED]


def _entry(name: str, reward: Reward, code: Mapping[str, str]) -> float | RewardConfig:
    made, options = getattr(reward, RECIPE, ("", {}))
    if made and made in REWARDS:
        factory = REWARDS[made].factory
        while isinstance(factory, partial):
            factory = factory.func
        spec = made if _is_installed(factory) else _import_path(getattr(factory, "__module__", ""), made, None)
        if spec and _is_plain(options):
            return 1.0 if spec == name and not options else RewardConfig(reward=spec, options=dict(options))
    return RewardConfig(reward=code.get(name) or _search(reward) or PASSED)


def _search(reward: Reward) -> str | None:
    """Find the import path of a function, or of an instance at the top level of a module."""
    target: Any = reward.function if isinstance(reward, FunctionReward) else reward
    module = getattr(target, "__module__", None) or type(target).__module__
    known = vars(sys.modules[module]) if module in sys.modules else {}
    # Naming a function rebuilds its reward with default settings, so other settings rule it out.
    alike = not isinstance(reward, FunctionReward) or reward == FunctionReward(reward.name, reward.function)
    wanted = [one for one in (reward, target if alike else None) if one is not None]
    names = (name for name, value in known.items() if any(value is one for one in wanted))
    return next((spec for name in names if (spec := _import_path(module, name, known[name]))), None)


def _import_path(module: str, name: str, value: Any) -> str | None:
    """Return ``module:name`` or ``file.py:name``, or None if neither resolves; ``value``: the expected object."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is None or not file or (value is not None and getattr(loaded, name, None) is not value):
        return None
    if _can_be_imported(loaded, Path(file)):
        return f"{module}:{name}"
    path = Path(file).resolve()
    if path.suffix != ".py" or (value is not None and name not in _top_level(path)):
        return None
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{name}"


def _can_be_imported(module: ModuleType, file: Path) -> bool:
    """Whether a later command can import the module: in a package, installed, or in the working directory."""
    name = module.__name__
    if name == "__main__" or name.startswith(PREFIX):
        return False
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    if found is None or not found.origin or Path(found.origin).resolve() != file.resolve():
        return False
    return "." in name or file.resolve().parent == Path.cwd() or "site-packages" in file.parts


def _top_level(path: Path) -> set[str]:
    """List names that a file defines at its top level, outside ``if __name__``."""
    names: set[str] = set()
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):  # the file has changed since it was loaded
        return names
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _is_installed(factory: Any) -> bool:
    """Whether the factory belongs to this package or to an installed plug-in."""
    module = getattr(factory, "__module__", "") or ""
    plugins = {point.value.partition(":")[0] for point in entry_points(group=PLUGINS)}
    return module.split(".")[0] == "diffalign" or module in plugins


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)
