"""Load and dump configuration files: YAML with the plain scalars of version 1.2 and without duplicate keys.

PyYAML reads version 1.1, in which ``no`` is False, ``12:30`` is 750, ``010`` is 8 and ``1e-4`` is text.
"""

from __future__ import annotations

import math
import numbers
import re
from typing import Any, ClassVar

import yaml

NUMBER = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_NULL = re.compile(r"(~|null|Null|NULL|)$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(repeated)} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
# On top of its own: the dumper quotes text that either version would take for something else.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def load(text: str) -> Any:
    """Load plain values from YAML. Raises yaml.YAMLError for invalid YAML or a duplicate key."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def compose(text: str) -> yaml.Node | None:
    """Parse YAML to a node with scalars as written. Raises yaml.YAMLError for invalid YAML."""
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def construct(node: yaml.Node) -> Any:
    """Construct the plain value of a node."""
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump(value: Any) -> str:
    """Dump YAML that ``load`` restores exactly; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_inline(value: Any) -> str:
    """Dump YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def as_float(value: float | numbers.Real) -> float:
    """Convert a number to a float; a whole number that no float can hold becomes infinite, as 1e999 does."""
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf
