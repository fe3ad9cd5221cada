"""The nine minutes on a card, rehearsed on a CPU."""

import importlib
import json
import sys

import pytest
import torch

from diffalign.trainers.registry import algorithm_names


@pytest.fixture
def day():
    return importlib.import_module("scripts.bench.gpu_day")


@pytest.fixture
def trainers(monkeypatch):
    found = importlib.import_module("scripts.bench.gpu_trainers")
    monkeypatch.setattr(found, "STEPS", 2)
    return found


# The others run with the whole day.
QUICK = {"flow_grpo"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in algorithm_names()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_learns_and_resumes_exactly(trainers, name):
    found = trainers.check(name)
    assert found["failed"] == []
    assert len(found["losses"]) == 2
    assert found["first_ratio"] == 1.0 or name != "flow_grpo"


GOOD = [{"loss": 0.5, "grad_norm": 1.0, "ratio_mean": 1.0}]
FAULTS = {
    "every step has a gradient": ("whole", {"grad_norm": 0.0}, 1.0),
    "on policy": ("whole", {"ratio_mean": 1.001}, 1.0),
    "resume is exact": ("stopped", {}, 1.1),
    "the first step is that of the CPU": ("cpu", {"grad_norm": 1.3}, 1.0),
    "it learns as on the CPU": ("cpu", {}, -1.0),
}


@pytest.mark.parametrize("title", FAULTS)
def test_a_fault_fails_its_check(trainers, title, monkeypatch):
    where, change, factor = FAULTS[title]

    def train(name, folder, **changes):
        (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        wrong = folder.name == where
        weights = torch.ones(3) * (factor if wrong else 1.0)
        return [GOOD[0] | (change if wrong else {})], weights, weights

    monkeypatch.setattr(trainers, "train", train)
    assert title in trainers.check("flow_grpo")["failed"]
    where = "nowhere"
    assert trainers.check("flow_grpo")["failed"] == []


def test_an_error_of_a_trainer_is_recorded_and_the_others_run(trainers, tmp_path, monkeypatch):
    def check(name):
        if name == "flow_grpo":
            raise RuntimeError("no such kernel")
        return {"failed": []}

    monkeypatch.setattr(trainers, "check", check)
    trainers.measure_trainers(file := tmp_path / "part.json")
    found = json.loads(file.read_text())
    assert found.pop("flow_grpo") == {"failed": ["RuntimeError: no such kernel"]}
    assert all(own == {"failed": []} for own in found.values())


def test_tests_are_counted(day, tmp_path):
    cases = '<testcase name="a"/><testcase name="b"><skipped/></testcase><testcase name="c"><failure/></testcase>'
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert day.test_counts(tmp_path / "junit.xml") == {"passed": 1, "skipped": 1, "failed": ["c"]}
    assert len(day.gpu_tests()) >= 4


@pytest.mark.slow
def test_the_whole_day_runs_at_tiny_size(day, tmp_path):
    found = day.run_all(day.PARTS, "tiny", tmp_path / "gpu.json")
    assert list(found["parts"]) == list(day.PARTS)
    for name, part in found["parts"].items():
        assert "problem" not in part["results"], (name, part)
    assert all(own["failed"] == [] for own in found["parts"]["trainers"]["results"].values())
    assert found["parts"]["tests"]["results"]["failed"] == []
    for name, part in found["parts"].items():
        for rows in part["results"].get("models", {}).values():
            for title, row in rows.items():
                known = "bitsandbytes" in str(row) or "no option" in str(row)
                assert known or row.get("share_of_matrix_peak") or row.get("same_work"), (name, title, row)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{\"x\": 1}')"


def test_parts_run_in_order_within_their_limits_and_are_written_at_once(day, tmp_path, monkeypatch):
    parts = {
        "good": day.Part("fine?", ("-c", WRITES), 60),
        "slow": day.Part("late?", ("-c", "import time; time.sleep(60)"), 1),
        "bad": day.Part("broken?", ("-c", "raise SystemExit('no such card')"), 60),
    }
    seen = []
    run = day.run

    def watched(part, size, limit):
        seen.append(list(json.loads(file.read_text())["parts"]) if file.exists() else [])
        return run(part, size, limit)

    file = tmp_path / "gpu.json"
    monkeypatch.setattr(day, "run", watched)
    day.run_all(parts, "tiny", file)
    found = json.loads(file.read_text())
    assert seen == [[], ["good"], ["good", "slow"]]
    assert found["parts"]["good"]["results"] == {"x": 1}
    assert "stopped after 1 s" in found["parts"]["slow"]["results"]["problem"]
    assert "no such card" in found["parts"]["bad"]["results"]["problem"]
    assert found["card"]
    assert found["versions"]["torch"]
    day.run_all(parts, "tiny", file, budget=0)
    assert json.loads(file.read_text())["parts"]["good"]["results"] == {"problem": "no time was left"}


def test_all_parts_fit_into_nine_minutes_and_their_scripts_exist(day):
    assert sum(part.limit for part in day.PARTS.values()) <= day.BUDGET == 540
    for part in day.PARTS.values():
        script = part.arguments[0]
        assert script == "-m" or (day.ROOT / script).is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_published_sizes_ask_for_a_gpu(day, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_day.py"])
    with pytest.raises(SystemExit):
        day.main()
    assert "need a CUDA device" in capsys.readouterr().err
