"""``diffalign configs``: list the configurations of the package, copy one to edit, or print where one is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from diffalign.atomic import write_text
from diffalign.embedded import config_file, config_names

USAGE = "diffalign configs, diffalign configs copy NAME [FILE], or diffalign configs path NAME"


def run(argv: Sequence[str]) -> None:
    """List, copy or locate. ValueError: unknown arguments or name, or the file to write exists."""
    match list(argv):
        case []:
            names = list(config_names())
            width = max(len(name) for name, _ in names)
            lines = (f"{name:{width}}  {shorten(about, 110, placeholder=' ...')}" for name, about in names)
            print("\n".join(lines))
        case ["path", name]:
            print(config_file(name))
        case ["copy", name, *rest] if len(rest) <= 1:
            print(copied(name, Path(rest[0]) if rest else None))
        case _:
            raise ValueError(f"configs {' '.join(argv)[:100]}: write {USAGE}")


def copied(name: str, target: Path | None = None) -> str:
    """Copy a configuration, by default to its last name in this folder; return how to use it."""
    source = config_file(name)
    target = target or Path(source.name)
    if target.exists():
        raise ValueError(f"{target} exists: name another file: diffalign configs copy {name} FILE.yaml")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    # Its schema is beside it in the package, and not beside the copy.
    schema = source.parents[1] / "schema" / f"{source.parent.name}.json"
    if lines[0].startswith("# yaml-language-server"):
        lines[0] = f"# yaml-language-server: $schema={schema}\n"
    write_text(target, "".join(lines))
    if source.parent.name == "accelerate":
        return f"accelerate launch --config_file {target} -m diffalign train TRAINER --config FILE.yaml"
    return f"diffalign train {source.parent.name} --config {target}"
