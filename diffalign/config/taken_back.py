"""Leave out what a file sets within a section and a typed option of that section makes meaningless.

``--lora.rank 0`` trains all weights, so the layers that a configuration file names for a LoRA do not apply. They are
left out with a warning. Given in the same place, on the command line or in the file, both are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from diffalign.config.conversion import build
from diffalign.config.schema import Place, config_arm, init_fields


def take_back(cls: type, file: Mapping[str, Any], merged: dict[str, Any], typed: Sequence[Sequence[str]]) -> None:
    """Remove from ``merged`` what typed options take back, with a warning.

    Args:
        cls: The configuration class.
        file: Values of the file that no typed option replaces.
        merged: Values of file and command line; its sections are changed.
        typed: Paths of the typed options.
    """
    for section, name, reason in _meaningless(cls, file, merged, typed):
        options = ", ".join(f"--{'.'.join(path)}" for path in typed if path[0] == section)
        warnings.warn(f"{section}.{name} of the config file {reason}: left out, because of {options}", stacklevel=2)
        del merged[section][name]


def _meaningless(
    cls: type, file: Mapping[str, Any], merged: Mapping[str, Any], typed: Sequence[Sequence[str]]
) -> Iterator[tuple[str, str, str]]:
    """Yield (section, field, reason) of values that the section would read without the typed options."""
    for field, hint in init_fields(cls):
        kind, own = config_arm(hint), file.get(field.name)
        if not (hasattr(kind, "unread") and isinstance(own, dict) and any(path[0] == field.name for path in typed)):
            continue
        place = Place("", kind)
        with suppress(ValueError):  # which building the whole configuration reports
            before, after = (build(kind, value, place).unread() for value in (own, merged[field.name]))
            named = [name for name in own if name in after and name not in before and own[name] is not None]
            yield from [(field.name, name, after[name]) for name in named]
