"""Import at first use (PEP 562), so that help texts and errors of configurations need neither torch nor diffusers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def attribute(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Import an attribute of ``package`` from its home module, or a submodule, and keep it there.

    AttributeError: it is neither.
    """
    if name in homes:
        value = getattr(import_module(homes[name]), name)
    elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
        return import_module(f"{package}.{name}")
    else:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    setattr(sys.modules[package], name, value)
    return value


def load(where: Any) -> Any:
    """Import what ``"module:name"`` names; anything else is returned as it is."""
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
