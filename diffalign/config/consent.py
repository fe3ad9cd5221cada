"""Refuse configuration files that set consent, secrets, or values that a field's guard rejects.

A field declared with ``option(..., typed_only=True)`` comes from the command line or from Python, never from a file. A
field declared with ``option(..., guard=function)`` has its value in a file checked: ``function(value, place, consent)``
raises ``place.error(...)``. Consent is the typed option ``--allow_reward_code``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffalign.config.schema import Place, config_arm, default_of, init_fields

CONSENT = "allow_reward_code"
FieldGuard = Callable[[Any, Place, bool], None]


def check_file(cls: Any, mapping: Mapping[str, Any], place: Place, consent: bool) -> None:
    """Refuse what a file may not decide.

    Args:
        cls: the configuration class.
        mapping: the values of the file that no typed option replaces.
        place: where they stand, for messages.
        consent: whether the user typed ``--allow_reward_code``.

    Raises:
        ValueError: a typed-only field that is set, or a value that its guard refuses.
    """
    for field, hint in init_fields(cls):
        if field.name not in mapping:
            continue
        value, here = mapping[field.name], place / field.name
        typed_only = field.metadata.get("typed_only", False) and not (field.name == CONSENT and consent)
        if typed_only and value != default_of(field, None):
            raise here.error(f"a file cannot set this: leave it out, and type --{here.path} with the command")
        if guard := field.metadata.get("guard"):
            guard(value, here, consent)
        if (arm := config_arm(hint)) and isinstance(value, Mapping):
            check_file(arm, value, here, consent)


def without(mapping: Mapping[str, Any], paths: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Copy ``mapping`` without the entries at ``paths``, which typed options replace."""
    left = copy.deepcopy(dict(mapping))
    for *sections, name in paths:
        inner: Any = left
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(name, None)
    return left
