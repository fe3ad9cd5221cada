"""Check that user code has the signature of a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

PARAMETERS = ("images", "prompts", "metadata")


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
