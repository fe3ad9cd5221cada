"""The script that counts: a row is green only where all of its tests passed."""

import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

HERE = Path(__file__).parent


@pytest.fixture
def trust(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("trust")


def test_rows_are_counted(trust):
    found = trust.summary(
        [
            ("tests/reliability/test_writing.py::test_r2_twenty", "passed", {"kills": 20}),
            ("tests/reliability/test_writing.py::test_r2_two_hundred", "failure", {"kills": 200}),
            ("tests/reliability/test_resume.py::test_r8_a[x]", "passed", {"points": 7}),
            ("tests/reliability/test_resume.py::test_r8_b[x]", "passed", {"null_points": 30}),
            ("tests/reliability/test_product.py::test_r36_a", "skipped", {}),
            ("tests/rewards/test_contract.py::test_the_contract[clip]", "passed", {}),
            ("tests/data/test_images.py::test_x", "error", {}),
            ("tests/reliability/test_trust.py::test_no_row", "failure", {}),
        ]
    )
    assert found["green"] == 2
    assert found["not_green"] == [2, 30, 36]
    assert found["kills"] == 220
    assert found["kills_survived"] == 20
    assert found["resume_points"] == found["resume_points_exact"] == 37
    assert found["resume_points_of_trainers"] == 7
    assert 28 not in found["not_run"]
    assert 1 in found["not_run"]


def test_every_row_has_a_test(trust):
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert {int(row) for row in re.findall(r"^def test_r(\d+)_", text, re.MULTILINE)} == set(range(1, trust.ROWS + 1))
    assert all((ROOT / file).is_file() for files in trust.ELSEWHERE.values() for file in files)
