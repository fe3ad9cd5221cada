"""Import rewards from user code: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "reward_code_"  # of module names of files
PARAMETERS = ("images", "prompts", "metadata")
HOW = "write module:function or file.py:function"
_CONSENT: ContextVar[bool] = ContextVar("consent", default=False)
_RUNNING: ContextVar[str] = ContextVar("running", default="")


@contextmanager
def consented(allowed: bool) -> Iterator[None]:
    """Grant consent to rewards that are built inside the context, such as those of ``combined``."""
    token = _CONSENT.set(allowed or _CONSENT.get())
    try:
        yield
    finally:
        _CONSENT.reset(token)


def running() -> str:
    """Return the file or module that is being imported; empty if none is."""
    return _RUNNING.get()


def load_code(spec: str) -> tuple[ModuleType, str]:
    """Import the module of ``spec``, and return it with the name of the reward in it.

    Raises ValueError without consent (nothing is imported or searched then), for a module of the standard library, and
    for code that is missing or raises.
    """
    if not _CONSENT.get():
        raise ValueError(
            f"reward {spec!r} is code: set allow_reward_code if you trust it (type --allow_reward_code; a file cannot "
            "say it), or name a registered reward"
        )
    where, _, name = spec.rpartition(":")
    if where.split(".")[0] in sys.stdlib_module_names | {"builtins"}:
        raise ValueError(f"reward {spec!r} cannot be loaded: {where} is part of Python and defines no reward; {HOW}")
    token = _RUNNING.set(where)
    try:
        return _run_file(Path(where)) if where.endswith(".py") else _import(where), name
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ValueError(f"reward {spec!r} cannot be loaded: {type(error).__name__}: {error}; {HOW}") from error
    finally:
        _RUNNING.reset(token)


def check_reward(spec: str, found: Any) -> None:
    """Check that an object has the signature of a reward, without calling it.

    A reward is a function, or a class with callable instances, with the parameters (images, prompts, metadata) in this
    order, followed by the group ids for group rewards.

    Raises ValueError for anything else, such as a class that only takes options.
    """
    call = _call_of(found)
    first = [] if call is None else _positional(call)[:3]
    required = [p for p in first if p.default is p.empty or p.name in PARAMETERS]
    if len(required) < 3:
        raise ValueError(
            f"reward {spec!r} is not a reward: it cannot be called with (images, prompts, metadata); name a function "
            "with these three parameters, or a class whose __call__ has them"
        )


def _call_of(found: Any) -> Callable[..., Any] | None:
    """Return the scoring function: the function itself, or ``__call__`` (``forward`` of a module) without ``self``."""
    if inspect.isfunction(found):
        return found
    kind = found if isinstance(found, type) else type(found)
    name = "forward" if "forward" in dir(kind) and "torch" in getattr(kind.__call__, "__module__", "") else "__call__"
    method = inspect.getattr_static(kind, name, None)
    if not inspect.isfunction(method):
        return found if callable(found) and hasattr(found, "func") else None  # functools.partial
    return method.__get__(object())


def _positional(call: Callable[..., Any]) -> list[inspect.Parameter]:
    """List the positional parameters; empty if there is no signature."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in parameters if parameter.kind in kinds]


def _import(name: str) -> ModuleType:
    """Import a module, also from the working directory, as ``python -m`` does."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module, once per process: a second run would register its rewards again."""
    path = path.resolve()
    name = f"{PREFIX}{str(path).encode().hex()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
