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


@pytest.mark.filterwarnings("ignore")
def test_every_trainer_learns_and_resumes_exactly(day, monkeypatch):
    monkeypatch.setattr(day, "STEPS", 2)
    found = day.trainers("tiny")
    assert list(found) == algorithm_names()
    for own in found.values():
        assert own["resume_is_exact"]
        assert own["first_ratio"] in (None, 1.0)
        assert all(norm > 0 for norm in own["gradient_norms"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dpo_sdxl", "refl_sd35"])
def test_a_measured_part_adds_up(day, name):
    found = day.MEASURES[name]("tiny")
    assert found["seconds_per_iteration"] > 0
    assert found["peak_memory_gib"] > 0
    assert found["evaluations"]["training"] > 0


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


def test_the_loop_in_plain_diffusers_does_the_same_work(day, tmp_path):
    gpu, loop = (importlib.import_module(f"scripts.bench.{name}") for name in ("gpu", "diffusers_loop"))
    case = gpu.CASES["sd35_medium_512"]
    row = gpu.measure(case, "tiny", "plain", {False: None}, 1.0, 1)
    found = gpu.against(case, "tiny", tmp_path, loop.prepare, {"plain": row}, 1)
    assert found.get("same_work"), found
    other = gpu.job_of(gpu.CASES["sdxl_1024"], "tiny", tmp_path)
    with pytest.raises(NotImplementedError, match="StableDiffusionXL"):
        loop.prepare(other)
