"""Load code of the user's own by name: ``module:function``, or ``file.py:function``."""

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

PREFIX = "reward_code_"  # of the names of modules that are loaded from a file
HOW = "write module:function or file.py:function"
_CONSENT: ContextVar[bool] = ContextVar("consent", default=False)
_RUNNING: ContextVar[str] = ContextVar("running", default="")


@contextmanager
def consented(allowed: bool) -> Iterator[None]:
    """Extend the user's consent to code that is loaded inside, such as the parts of the reward ``combined``."""
    token = _CONSENT.set(allowed or _CONSENT.get())
    try:
        yield
    finally:
        _CONSENT.reset(token)


def running() -> str:
    """Return the file or module that is being loaded; empty where none is."""
    return _RUNNING.get()


def load_code(spec: str, kind: str = "reward") -> tuple[ModuleType, str]:
    """Import the module that ``spec`` names, and return it with the name of the object in it.

    Args:
        spec: ``module:function`` or ``file.py:function``.
        kind: What the object is, for messages: "reward", "loss" ...

    Raises:
        ValueError: No consent (nothing is imported then, not even to look), a module of Python itself, or code that is
            missing or faulty.
    """
    if not _CONSENT.get():
        raise ValueError(
            f"{kind} {spec!r} is code: set allow_reward_code if you trust it (type --allow_reward_code; a file cannot "
            f"say it), or name a registered {kind}"
        )
    where, _, name = spec.rpartition(":")
    if where.split(".")[0] in sys.stdlib_module_names | {"builtins"}:
        raise ValueError(f"{kind} {spec!r} cannot be loaded: {where} is a part of Python and holds no {kind}; {HOW}")
    token = _RUNNING.set(where)
    try:
        return _run_file(Path(where)) if where.endswith(".py") else _import(where), name
    except (Exception, SystemExit) as error:  # the code of a user: what it raises is unknown
        raise ValueError(f"{kind} {spec!r} cannot be loaded: {type(error).__name__}: {error}; {HOW}") from error
    finally:
        _RUNNING.reset(token)


def _import(name: str) -> ModuleType:
    """Import a module, also one in the working folder, as ``python -m`` would."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _run_file(path: Path) -> ModuleType:
    """Import a file as a module, once per process: a second time it could not register its objects."""
    path = path.resolve()
    name = f"{PREFIX}{str(path).encode().hex()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
