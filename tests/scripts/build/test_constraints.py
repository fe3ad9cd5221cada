"""The versions for ``pip install -c``: one of every package that diffalign needs, within pyproject's bounds."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import ROOT
from scripts.build import constraints

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in constraints.FILE.read_text().splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *EXTRAS["tracking"], *EXTRAS["ocr"]])
def test_each_dependency_is_pinned_within_its_bounds(text):
    wanted = Requirement(text)
    assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


def test_the_file_is_what_the_script_writes():
    lines = constraints.FILE.read_text().splitlines()
    assert lines[0] + "\n" == constraints.HEAD
    assert lines[1:] == sorted(lines[1:], key=lambda line: line.split("==")[0])
    assert set(constraints.EXTRAS) == set(EXTRAS)
    assert set(constraints.installed()) <= set(PINS)
    assert all(re.fullmatch(r"[\w.]+", version) for version in PINS.values())  # no +cpu, which is not on PyPI


def test_another_version_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["constraints.py", "--check"])
    monkeypatch.setattr(constraints, "installed", lambda: {**PINS, "torch": "0.1"})
    with pytest.raises(SystemExit, match=r"torch==0\.1"):
        constraints.main()


def test_the_image_copies_what_is_there():
    lines = (ROOT / "scripts/examples/Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert any("-c assets/constraints.txt" in line for line in lines)
