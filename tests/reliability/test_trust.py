"""The script that counts: a row is green only where all of its tests passed."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.reliability import kills

HERE = Path(__file__).parent


@pytest.fixture
def trust(monkeypatch):
    return importlib.import_module("scripts.studies.trust")


def noted(name, outcome="passed", cpu=1.0, **counts):
    return {"name": name, "outcome": outcome, "counts": counts, "cpu": cpu}


def test_rows_are_counted(trust):
    found = trust.summary(
        [
            noted("tests/reliability/test_writing.py::test_r2_twenty", kills=20),
            noted(trust.KILLS, "failure", kills=200, cpu=43.0),
            noted("tests/reliability/test_resume.py::test_r8_a[x]", points=8, cpu=4.0),
            noted("tests/reliability/test_resume.py::test_r8_b[x]", null_points=30),
            noted("tests/reliability/test_product.py::test_r36_a", "skipped"),
            noted("tests/rewards/test_contract.py::test_the_contract[clip]"),
            noted("tests/data/test_images.py::test_x", "error"),
            noted("tests/reliability/test_trust.py::test_no_row", "failure"),
        ]
    )
    assert found["green"] == 2
    assert found["not_green"] == [2, 30, 36]
    assert found["kills"] == 220
    assert found["kills_survived"] == 20
    assert found["resume_points"] == found["resume_points_exact"] == 38
    assert found["resume_points_of_trainers"] == 8
    assert found["core_seconds"] == {"all": 53.0, "kill": 0.2, "resume_point": 0.5}
    assert 28 not in found["not_run"]
    assert 1 in found["not_run"]


def test_what_was_tried_counts_as_right_only_where_its_test_passed(trust):
    found = trust.summary(
        [
            noted("tests/reliability/test_hostile_settings.py::test_a[x]", settings=300, settings_right=300),
            noted("tests/reliability/test_damaged_folders.py::test_a[x]", folders=1, folders_right=1),
            noted("tests/reliability/test_damaged_folders.py::test_a[y]", "failure", folders=1),
            noted("tests/rewards/test_load.py::test_b", requests=1640, requests_answered=1640),
        ]
    )
    assert found["tried"] == {
        "settings": {"tried": 300, "right": 300},
        "folders": {"tried": 2, "right": 1},
        "attacks": {"tried": 0, "right": 0},
        "requests": {"tried": 1640, "right": 1640},
    }
    assert set(trust.TRIED.values()) < set(trust.COUNTS)


@pytest.mark.parametrize(("rows", "expected"), [(range(1, 42), 1), ([2], 0)])
def test_sweeps_belong_to_no_row_and_come_with_all(trust, tmp_path, rows, expected):
    items = [SimpleNamespace(nodeid=f"{trust.SWEEPS[0]}::test_a")]
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    trust.Watcher(trust.Ledger(tmp_path / "tests.jsonl"), rows, 0, 1).pytest_collection_modifyitems(config, items)
    assert len(items) == expected
    assert all((ROOT / file).is_file() for file in trust.SWEEPS)


def test_what_has_passed_is_not_run_again_and_several_share_the_rest(trust, tmp_path):
    ledger = trust.Ledger(tmp_path / "tests.jsonl")
    items = [SimpleNamespace(nodeid=f"tests/reliability/test_x.py::test_r{row}_it") for row in (1, 2, 8, 9, 10, 11)]
    items.append(SimpleNamespace(nodeid=f"tests/reliability/test_writing.py{trust.BY_KILLS}"))
    ledger.add(noted(items[1].nodeid))
    ledger.add(noted(items[2].nodeid, "failure"))
    with ledger.path.open("a") as file:
        file.write('{"name": "tests/reliability/test_x.py::test_r9_it", "outcome": "passed", "counts": {}')
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    left = []
    for job in (0, 1):
        mine = list(items)
        trust.Watcher(ledger, [1, 2, 8, 9, 10], job, 2).pytest_collection_modifyitems(config, mine)
        left.append([item.nodeid.split("::")[1] for item in mine])
    assert left == [["test_r1_it", "test_r8_it", "test_r10_it"], ["test_r9_it"]]


def test_each_test_is_noted_with_its_outcome_and_counts(trust, tmp_path):
    ledger = trust.Ledger(tmp_path / "tests.jsonl")
    watcher = trust.Watcher(ledger, [8], 0, 1)
    for name, outcomes in {"good": "ppp", "bad": "pfp", "torn": "ppf", "left": "sp"}.items():
        watcher.pytest_runtest_logstart(name)
        for when, outcome in zip(("setup", "call", "teardown") if len(outcomes) == 3 else ("setup", "teardown"),
                                 outcomes, strict=True):  # fmt: skip
            said = {"p": "passed", "f": "failed", "s": "skipped"}[outcome]
            watcher.pytest_runtest_logreport(
                SimpleNamespace(nodeid=name, when=when, outcome=said, user_properties=[("points", 7), ("other", "x")])
            )
    assert [(row["name"], row["outcome"]) for row in ledger.rows()] == [
        ("good", "passed"),
        ("bad", "failure"),
        ("torn", "error"),
        ("left", "skipped"),
    ]
    assert all(row["counts"] == {"points": 7} and row["cpu"] >= 0 for row in ledger.rows())


def test_work_that_ended_before_its_end_gives_no_figures(trust):
    def work(job, jobs):
        if job == 1:
            raise ZeroDivisionError

    trust.together(lambda job, jobs: None, 2)
    with pytest.raises(trust.Unfinished):
        trust.together(work, 2)


@pytest.mark.slow
def test_kills_go_on_where_they_stopped_and_count_when_the_run_was_compared(trust, tmp_path, monkeypatch):
    trust.run_kills(tmp_path, 2, 0, 1)
    first = trust.Ledger(tmp_path / "kills-0.jsonl").rows()
    trust.run_kills(tmp_path, 3, 0, 1)
    rows = trust.Ledger(tmp_path / "kills-0.jsonl").rows()
    assert rows[: len(first)] == first
    assert [row["kill"] for row in rows if "kill" in row] == [0, 1, 2]
    (found,) = trust.kills(tmp_path)
    assert (found["outcome"], found["counts"]) == ("passed", {"kills": 3})
    saved = kills._saved
    monkeypatch.setattr(kills, "_saved", lambda folder: [*saved(folder), 10**6])
    trust.run_kills(tmp_path, 4, 0, 1)
    assert "was lost" in trust.Ledger(tmp_path / "kills-0.jsonl").rows()[-1]["failed"]
    assert trust.kills(tmp_path)[0]["outcome"] == "failure"


def test_every_row_has_a_test(trust):
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert {int(row) for row in re.findall(r"^def test_r(\d+)_", text, re.MULTILINE)} == set(range(1, trust.ROWS + 1))
    assert all((ROOT / file).is_file() for files in trust.ELSEWHERE.values() for file in files)
