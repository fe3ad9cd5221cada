"""Declare configuration fields, and check their values wherever they come from.

Validation is our own, not pydantic's (2.14 was measured): its import alone takes 0.18 s, as long as all of ``--help``.
A mistake in ``float | RewardConfig`` gives two errors, with names of types within the dotted path; its strict mode
refuses text for a ``Path`` and lists for tuples, its lax mode takes ``"1"`` for a number; it suggests no key; and
command-line text and partial sections, which are read by annotation, would remain our own code.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, ClassVar, Literal, Self

from diffalign.config.consent import FieldGuard
from diffalign.config.conversion import convert, named
from diffalign.config.ranges import problems as range_problems
from diffalign.config.ranges import range_metadata, range_of
from diffalign.config.schema import ConfigError, Place, default_of, init_fields, problems_of
from diffalign.embedded import located


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the values of a configuration come from.

    Attributes:
        names: The fields that were set.
        defaults: The values of the fields before that, by name.
    """

    names: frozenset[str]
    defaults: Mapping[str, Any]


Given = Origin | None


def option(
    default: Any = MISSING,
    help: str = "",
    bare: Any = None,
    *,
    section: str = "",
    resume: Literal["fixed", "free"] = "fixed",
    typed_only: bool = False,
    guard: FieldGuard | None = None,
    **limits: Any,
) -> Any:
    """Declare a dataclass field with a one-line description for ``--help``.

    Args:
        default: The default value; a mutable one is copied for each instance.
        help: The description.
        bare: Of a dict, the value of an entry that is given by its name alone: ``--rewards a,b``.
        section: The heading of ``--help`` that the field stands under; fields of a nested configuration default to
            that of the field which holds it.
        resume: "free" for a field that may differ when a run is resumed.
        typed_only: Whether a file may not set the field (see ``consent``); its value is never written to a file either.
        guard: Checks what a file sets (see ``consent``).
        limits: Of numbers, as for ``ranges.Range``: ge, gt, le, lt, infinite, hint.
    """
    kw: dict[str, Any] = {}
    if isinstance(default, Checked):
        default.mark_given(())
    if type(default).__hash__ is None:
        kw["default_factory"] = lambda: copy.deepcopy(default)
    elif default is not MISSING:
        kw["default"] = default
    metadata = {"help": help, "section": section, "resume": resume, "typed_only": typed_only, "guard": guard}
    metadata |= range_metadata(**limits) | ({} if bare is None else {"bare": bare})
    return dataclasses.field(metadata=metadata, **kw)


class Checked:
    """Base of configuration dataclasses: types and ranges are checked in Python as they are in files.

    ``given`` says which fields were set; a class that declares ``given: InitVar[Given] = None`` keeps it through
    ``dataclasses.replace``, which passes the attribute on.
    """

    numbers_checked: ClassVar[bool] = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record which fields are passed, before the generated ``__init__`` fills in the others."""
        self = super().__new__(cls)
        positional = [field.name for field in dataclasses.fields(cls) if not field.kw_only]  # type: ignore[arg-type]
        passed = {*kwargs, *positional[: len(args)]} - {"given"}
        object.__setattr__(self, "_passed", frozenset(passed))
        return self

    def __post_init__(self, given: Given = None) -> None:
        """Convert and check every field. Raises ConfigError with all errors, a sentence each."""
        self.check()
        names = vars(self).pop("_passed")
        defaults = {field.name: default_of(field, MISSING) for field, _ in init_fields(type(self))}
        if given is not None:  # made by dataclasses.replace, which passes every field
            changed = {name for name in names if getattr(self, name) != given.defaults.get(name, MISSING)}
            names, defaults = given.names | changed, dict(given.defaults)
        object.__setattr__(self, "given", Origin(frozenset(names), defaults))

    def mark_given(self, names: Iterable[str], base: Any = None) -> None:
        """Record the fields that the user set; before, they had the values of ``base``, by default of this instance."""
        source = self if base is None else base
        defaults = {field.name: getattr(source, field.name) for field, _ in init_fields(type(self))}
        object.__setattr__(self, "given", Origin(frozenset(names), defaults))

    def check(self) -> None:
        """Convert and check every field again, as after an assignment."""
        cls = type(self)
        place, found = Place(cls.__name__, cls), list[str]()
        for field, hint in init_fields(cls):
            here, value = place / field.name, getattr(self, field.name)
            try:
                value = convert(hint, named(field, value, here), here, default_of(field, MISSING))
                value = located(value, field.name)
                object.__setattr__(self, field.name, value)
            except ValueError as error:
                found.extend(problems_of(error))
            else:
                found += [f"{place.source}: {p}" for p in range_problems(value, range_of(field), field.name)]
        if found:
            raise ConfigError(found)


def given_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of each field that was set, those of a section one by one."""
    for name in sorted(config.given.names):
        value = getattr(config, name)
        if isinstance(value, Checked):
            yield from given_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def free_fields(cls: Any) -> frozenset[str]:
    """List the fields that may differ when a run is resumed."""
    return frozenset(field.name for field, _ in init_fields(cls) if field.metadata.get("resume") == "free")
