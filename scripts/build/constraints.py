"""Write the versions that the tests run with, for ``pip install -c assets/constraints.txt``.

    python scripts/build/constraints.py          # write those of this environment
    python scripts/build/constraints.py --check  # fail where this environment has others, as .ci/run does

To refresh: install the newest versions in a fresh environment (``pip install -e ".[test]"``), run the tests, write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = Path(__file__).parents[2] / "assets/constraints.txt"
HEAD = "# Versions that CI tests, of every package that diffalign needs: pip install -e . -c assets/constraints.txt\n"
EXTRAS = ("ocr", "tracking", "test", "quantise", "xformers", "s3", "gcs")


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Yield the installed packages that a package needs, and what those need."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    for text in requires(name) or ():
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            own = canonicalize_name(wanted.name)
            try:
                version(own)
            except PackageNotFoundError:  # of an extra that is not installed, or of another platform
                continue
            yield own
            yield from needed(own, frozenset(wanted.extras), seen)


def installed() -> dict[str, str]:
    """Return name -> version of every package that diffalign needs here, without local labels such as +cpu."""
    found = set(needed("diffalign", frozenset(EXTRAS), set())) - {"diffalign"}
    return {name: version(name).partition("+")[0] for name in sorted(found)}


def main() -> None:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the file with this environment")
    here = {name: f"{name}=={number}" for name, number in installed().items()}
    if not parser.parse_args().check:
        FILE.write_text(HEAD + "\n".join(here.values()) + "\n", encoding="utf-8")
        return
    written = FILE.read_text(encoding="utf-8").splitlines()[1:]
    if problems := sorted({*here.values()} - {*written}):
        sys.exit(
            f"{FILE} has not the versions of this environment: {', '.join(problems)}; run the script without --check"
        )


if __name__ == "__main__":
    main()
