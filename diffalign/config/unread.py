"""Refuse options that a run would not read.

A configuration class may have a method ``unread() -> Mapping[str, str]``: dotted name -> reason, for each field or
section that a run of this configuration does not read; and an option may be declared with ``needs``, another field.
Such a field is refused if it was set, even to its default, and is not written to files. null asks for nothing: it takes
back what a file or a preset sets, and is never refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from diffalign.config.fields import given_names
from diffalign.config.renamed import REMOVED
from diffalign.config.schema import ConfigError
from diffalign.remote import shown


def covering(names: Collection[str], path: str) -> str | None:
    """Return the entry of ``names`` that is ``path`` or a section around it, if any."""
    parts = path.split(".")
    return next((name for i in range(len(parts)) if (name := ".".join(parts[: i + 1])) in names), None)


def unread_names(config: Any) -> Mapping[str, str]:
    """Return the unread fields of a configuration and its sections: of ``unread``, and without a field they need."""
    found = dict(config.unread()) if hasattr(config, "unread") else {}
    for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        section = getattr(config, field.name, None)
        if dataclasses.is_dataclass(section) and hasattr(section, "unread"):
            found |= {f"{field.name}.{name}": reason for name, reason in section.unread().items()}
        if (other := field.metadata.get("needs")) and not getattr(config, other):
            found[field.name] = f"read only with {other}"
    return found


def accepts(config: Any, path: str) -> bool:
    """Return whether a run of a configuration reads the field at a dotted path; removed fields are not read."""
    return covering(unread_names(config), path) is None and path not in REMOVED.get(type(config).__name__, {})


def refuse_unread(config: Any) -> None:
    """Raise ConfigError for fields that were set and would not be read, a sentence per reason."""
    unread, found = unread_names(config), dict[str, list[str]]()
    for path in given_names(config):
        if (name := covering(unread, path)) is not None and attrgetter(path)(config) is not None:
            found.setdefault(unread[name], []).append(path)
    if found:
        raise ConfigError(
            [
                f"{', '.join(paths)}: {reason}; leave {'it' if len(paths) == 1 else 'them'} out"
                for reason, paths in found.items()
            ]
        )


def _entry(value: Any) -> Any:
    """Convert an entry of a table; one with fields, without those that are null by default."""
    found = plain(value)
    if not dataclasses.is_dataclass(value):
        return found
    unset = {field.name for field in dataclasses.fields(value) if field.default is None}
    return {name: one for name, one in found.items() if one is not None or name not in unset}


def plain(value: Any, unread: Collection[str] = (), path: str = "") -> Any:
    """Convert a value to dicts, lists and scalars, without typed-only fields and those named by ``unread``."""
    if dataclasses.is_dataclass(value):
        found = {}
        for field in dataclasses.fields(value):
            own = f"{path}.{field.name}" if path else field.name
            if field.init and not field.metadata.get("typed_only") and own not in unread:
                found[field.name] = plain(getattr(value, field.name), unread, own)
        return found
    if isinstance(value, Mapping):
        return {name: _entry(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return shown(value) if isinstance(value, Path) else value
