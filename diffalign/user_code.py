"""Import objects from user code: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

PREFIX = "reward_code_"  # of module names of files
HOW = "write module:function or file.py:function"
_CONSENT: ContextVar[bool] = ContextVar("consent", default=False)
_RUNNING: ContextVar[str] = ContextVar("running", default="")


@contextmanager
def consented(allowed: bool) -> Iterator[None]:
    """Grant consent to code that is imported inside the context, such as the rewards of ``combined``."""
    token = _CONSENT.set(allowed or _CONSENT.get())
    try:
        yield
    finally:
        _CONSENT.reset(token)


def running() -> str:
    """Return the file or module that is being imported; empty if none is."""
    return _RUNNING.get()


def load_code(spec: str, kind: str = "reward") -> tuple[ModuleType, str]:
    """Import the module that ``spec`` names, and return it with the name of the object in it.

    Args:
        spec: ``module:function`` or ``file.py:function``.
        kind: What the object is, for messages: "reward", "loss" ...

    Raises:
        ValueError: no consent (nothing is imported or searched then), a module of the standard library, or code that
            is missing or raises.
    """
    if not _CONSENT.get():
        raise ValueError(
            f"{kind} {spec!r} is code: set allow_reward_code if you trust it (type --allow_reward_code; a file cannot "
            f"say it), or name a registered {kind}"
        )
    where, _, name = spec.rpartition(":")
    if where.split(".")[0] in sys.stdlib_module_names | {"builtins"}:
        raise ValueError(f"{kind} {spec!r} cannot be loaded: {where} is part of Python and defines no {kind}; {HOW}")
    token = _RUNNING.set(where)
    try:
        return _run_file(Path(where)) if where.endswith(".py") else _import(where), name
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ValueError(f"{kind} {spec!r} cannot be loaded: {type(error).__name__}: {error}; {HOW}") from error
    finally:
        _RUNNING.reset(token)


def _import(name: str) -> ModuleType:
    """Import a module, also from the working directory, as ``python -m`` does."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module, once per process: a second run would register its objects again."""
    path = path.resolve()
    name = f"{PREFIX}{str(path).encode().hex()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
