"""Check that code of the user's own can be called as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

PARAMETERS = ("images", "prompts", "metadata")


def check_reward(spec: str, found: Any) -> None:
    """Refuse what cannot be a reward, before anything of it is called.

    A reward is a function, or a class whose instances can be called, with (images, prompts, metadata), in that order
    and each a parameter of its own, and for group rewards a fourth, the group ids.

    ValueError: anything else, such as a class that only takes options.
    """
    call = _call_of(found)
    taken = [] if call is None else _positional(call)[:3]
    own = [p for p in taken if p.default is p.empty or p.name in PARAMETERS]
    if len(own) < 3:
        raise ValueError(
            f"reward {spec!r} is not a reward: it cannot be called with (images, prompts, metadata); name a function "
            "with these three parameters, or a class whose __call__ has them"
        )


def _call_of(found: Any) -> Callable[..., Any] | None:
    """The function that scores: the function itself, or ``__call__`` (``forward`` of a module) without ``self``."""
    if inspect.isfunction(found):
        return found
    kind = found if isinstance(found, type) else type(found)
    name = "forward" if "forward" in dir(kind) and "torch" in getattr(kind.__call__, "__module__", "") else "__call__"
    method = inspect.getattr_static(kind, name, None)
    if not inspect.isfunction(method):
        return found if callable(found) and hasattr(found, "func") else None  # functools.partial
    return method.__get__(object())


def _positional(call: Callable[..., Any]) -> list[inspect.Parameter]:
    """The positional parameters; none where there is no signature."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in parameters if parameter.kind in kinds]
