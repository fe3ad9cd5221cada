"""Trials run once, in parallel, and a failed one is named."""

import sys
from dataclasses import dataclass

import pytest

from scripts.studies import trials


@dataclass(frozen=True)
class Small:
    """A trial that needs no training."""

    name: str
    code: str

    def folder(self, root):
        return root / self.name

    def command(self, root):
        self.folder(root).mkdir(exist_ok=True)
        return [sys.executable, "-c", self.code, str(self.folder(root))]

    def row(self, root):
        return {"gain": 0.0}


def test_trials_run_once_beside_each_other_and_a_failed_one_is_named(tmp_path):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'README.md').open('a').write('x')"
    small = [Small(name, write) for name in "abc"]
    trials.work(small, tmp_path, 2)
    trials.work(small, tmp_path, 2)
    assert [(tmp_path / name / "README.md").read_text() for name in "abc"] == ["x"] * 3
    assert 0 < trials.peak_memory(tmp_path / "a") < 1
    assert trials.peak_memory(tmp_path) is None
    with pytest.raises(RuntimeError, match=r"d\.log \(exit 3\)"):
        trials.work([Small("d", "raise SystemExit(3)")], tmp_path, 1)
    assert not (tmp_path / "d/cost.json").exists()
