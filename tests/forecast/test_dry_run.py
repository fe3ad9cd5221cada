"""``--dry_run``: says what a run will do, and leaves no trace of itself."""

import re
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from diffalign.cli import main
from diffalign.forecast import dry_run as module
from diffalign.forecast.cost import Work
from diffalign.forecast.dry_run import duration, time_lines
from diffalign.forecast.timing import Pace
from tests.conftest import ROOT

GRPO = ["train", "flow_grpo", "--config", str(ROOT / "configs/flow_grpo/shapes.yaml"), "--dry_run"]
DPO = ["train", "diffusion_dpo", "--config", str(ROOT / "configs/diffusion_dpo/shapes.yaml"), "--dry_run"]
RENEG = ["train", "refl", "--config", str(ROOT / "configs/refl/shapes_reneg.yaml"), "--dry_run"]
SMALL = ["--rollout_batch_size", "8", "--train_batch_size", "4", "--lora.targets", "null"]


@pytest.mark.parametrize(
    "argv", [[*GRPO, *SMALL], [*DPO, *SMALL, "--data.scan", "4", "--num_pairs", "4"], [*RENEG, *SMALL]]
)
def test_a_dry_run_prints_the_forecast_and_writes_nothing(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "assets").rglob("*")}
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "assets").rglob("*")}
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    kinds = ["batches", "model evaluations, over all processes", "memory of a process", "time"]
    assert titles == ["configuration", *kinds]
    assert "  rollout_batch_size: 8\n" in text
    assert re.search(r"  [\d.]+ ms per evaluation, [\d.]+ ms with its backward pass", text)
    # A trained negative prompt is a few kilobytes.
    assert bool(re.search(r"trained +0\.\d+ GiB", text)) != ("refl" in argv)


def test_figures_of_the_quickstart(tmp_path, monkeypatch, capsys):
    """32 groups of 8, 8 steps of which 2 are trained, 150 iterations; three evaluations of the held-out prompts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "_timed", lambda *arguments: 0)
    monkeypatch.setattr(module, "free_memory", lambda: (2**40, "a stand-in"))
    monkeypatch.setattr("diffalign.trainers.flow_grpo.algorithm.FlowGRPOTrainer.__init__", lambda self, args: None)
    assert main([*GRPO, "--output_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "32 prompts x 8 images = 256 images per iteration over 1 process(es): 256 each" in text
    assert "each accumulates at most 2 passes: 1 micro-batch(es) of 256 images x 2 trained steps" in text
    assert "images without an advantage are left out" in text
    assert f"training   {150 * 256 * 2:>15,}        2.00 per image" in text
    assert f"comparing  {256 * 4:>15,}" in text
    assert f"{150 * 256:,} images are made to train on" in text


def test_weights_in_shards_are_counted_as_such(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "free_memory", lambda: (10, "a small card"))
    found = []
    monkeypatch.setattr(module, "memory_lines", lambda forecast, *_: found.append(forecast.needs) or [])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert main([*GRPO, "--output_dir", str(tmp_path), "--lora.rank", "0"]) == 1
    one, two = found
    assert two.trainable == pytest.approx(one.trainable / 2, abs=1000)
    assert (one.gathered, two.gathered > 0) == (0, True)
    assert two.frozen == one.frozen  # what does not train is in no shards
    assert main([*GRPO, "--output_dir", str(tmp_path), "--compile", "true"]) == 2
    assert "compile True does not go with FSDP2" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_not_loaded_and_exits_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "free_memory", lambda: (10, "a small card"))
    assert main([*GRPO, "--output_dir", str(tmp_path)]) == 1
    assert "not measured: it does not fit" in capsys.readouterr().out


def test_a_pass_that_does_not_fit_names_the_option_to_lower(monkeypatch, capsys, small):
    def measure(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    class Stub:
        args, run = small(), None
        loop = SimpleNamespace(state=SimpleNamespace(optimizer=None))

    monkeypatch.setattr(module, "measure", measure)
    assert module._timed(Stub, (4, 4), Work(), print) == 1
    assert "(CUDA out of memory. Tried to allocate 9 GiB.): lower train_batch_size" in capsys.readouterr().out


def test_bad_settings_are_refused_before_anything_is_said(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([*GRPO, "--group_size", "1"]) == 2
    assert "a lone image has no group" in capsys.readouterr().err


def test_time_is_the_work_at_the_measured_pace():
    pace = Pace(forward=0.5, training=2.0, decoding=0.1, peak=None)
    judged = replace(pace, judging=0.3)
    assert judged.seconds(Work(generated=10, judged=20)) == pytest.approx(20 * 0.3)
    work = Work(generated=10, sampling=100, training=20, comparing=4, evaluating=6)
    assert pace.seconds(work) == pytest.approx(110 * 0.5 + 20 * 2.0 + 10 * 0.1)
    assert time_lines(pace, work, steps=4)[1] == "1 min 36 s in all, 24.00 s per optimizer step, without rewards"
    assert duration(3600 * 5 + 59) == "5 h 0 min"


def test_free_memory_is_that_of_the_machine():
    free, _ = module.free_memory()
    assert 0 < free <= psutil.virtual_memory().total or torch.cuda.is_available()
