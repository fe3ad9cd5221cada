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
from diffalign.forecast.dry_run import duration, pace_lines
from diffalign.forecast.rehearsal import Rehearsed
from diffalign.forecast.report import peak_line
from diffalign.forecast.timing import Pace
from diffalign.models.weight_memory import Spread
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT

GRPO = ["train", "flow_grpo", "--config", str(ROOT / "configs/flow_grpo/shapes.yaml"), "--dry_run"]
DPO = ["train", "diffusion_dpo", "--config", str(ROOT / "configs/diffusion_dpo/shapes.yaml"), "--dry_run"]
RENEG = ["train", "refl", "--config", str(ROOT / "configs/refl/shapes_reneg.yaml"), "--dry_run"]
SMALL = ["--rollout_batch_size", "8", "--train_batch_size", "4", "--lora.targets", "null"]


@pytest.mark.parametrize(
    "argv",
    [
        [*GRPO, *SMALL, "--num_groups", "2"],
        [*DPO, *SMALL, "--data.scan", "4", "--num_pairs", "4"],
        pytest.param([*RENEG, *SMALL, "--num_groups", "8"], marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_prints_the_forecast_and_writes_nothing(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "assets").rglob("*")}
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "assets").rglob("*")}
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    memory = "memory of a process, and what it computes in an iteration"
    kinds = ["batches", "model evaluations, over all processes", memory, "time"]
    assert titles == ["configuration", *kinds]
    assert "  rollout_batch_size: 8\n" in text
    assert re.search(r"  [\d.]+ ms per evaluation, [\d.]+ ms with its backward pass", text)
    assert re.search(r"forward and backward +\d+\.\d\d GiB +[\d.,]+ TFLOP +[\d,]+ evaluations", text)
    assert re.search(r"peak: [\d.]+ GiB while .*would lower it", text)


def test_figures_of_the_quickstart(tmp_path, monkeypatch, capsys):
    """32 groups of 8, 8 steps of which 2 are trained, 150 iterations; three evaluations of the held-out prompts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "_timed", lambda *arguments: 0)
    monkeypatch.setattr(module, "rehearse", lambda *_, **options: stand_in({("train", "backward"): 2**20}))
    monkeypatch.setattr(module, "free_memory", lambda: (2**40, "a stand-in"))
    monkeypatch.setattr("diffalign.trainers.base.Trainer.__init__", lambda self, args: None)
    assert main([*GRPO, "--output_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "32 prompts x 8 images = 256 images per iteration over 1 process(es): 256 each" in text
    assert "each accumulates at most 2 passes: 1 micro-batch(es) of 256 images x 2 trained steps" in text
    assert "images without an advantage are left out" in text
    assert f"training   {150 * 256 * 2:>15,}        2.00 per image" in text
    assert f"comparing  {256 * 4:>15,}" in text
    assert f"{150 * 256:,} images are made to train on" in text


def stand_in(sizes):
    """A rehearsal that found these bytes by (phase, part)."""
    return Rehearsed(sizes, {("train", "evaluate"): 10**15}, {}, {("train", "evaluate"): 8}, 2, 100)


def test_a_number_of_processes_and_a_card_are_forecast_without_loading_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    asked = []

    def rehearse(entry, config, world, spread, cpu):
        asked.append((world, spread, cpu))
        return stand_in({("train", "backward"): 2**30})

    monkeypatch.setattr(module, "rehearse", rehearse)
    assert main([*GRPO, "--output_dir", str(tmp_path), "--world", "8", "--card", "4090"]) == 0
    text = capsys.readouterr().out
    assert "over 8 process(es): 32 each" in text
    assert "free: 22.4 GiB, GeForce RTX 4090" in text
    # 10^15 operations at 40 % of 165.2 10^12 a second, twice an iteration.
    assert "GeForce RTX 4090: 0.0 s to sample, or read, and 15.1 s per optimizer step; 30.3 s an iteration" in text
    assert "assumed: 40% of the peak rate" in text
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main([*GRPO, "--output_dir", str(tmp_path), "--world", "2"]) == 0
    assert asked == [(8, None, False), (2, Spread(2), True)]
    assert main([*GRPO, "--output_dir", str(tmp_path), "--world", "2", "--compile", "true"]) == 2
    assert "compile True does not go with FSDP2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--world", "many"], "no number of processes"),
        (["--card", "h10"], "did you mean h100?"),
        (["--world"], "--world 8"),
    ],
)
def test_a_wrong_place_is_refused_by_name(more, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([*GRPO, *more]) == 2
    assert message in capsys.readouterr().err


def test_code_that_does_not_run_on_fake_tensors_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def rehearse(*arguments, **options):
        raise RuntimeError("asks for values")

    monkeypatch.setattr(module, "rehearse", rehearse)
    assert main([*GRPO, "--output_dir", str(tmp_path), "--card", "h100"]) == 0
    assert (
        "not forecast: its code does not run on fake tensors (RuntimeError: asks for values)" in capsys.readouterr().out
    )


def test_a_run_that_does_not_fit_is_not_loaded_and_exits_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "free_memory", lambda: (10, "a small card"))
    monkeypatch.setattr(module, "rehearse", lambda *_, **options: stand_in({("train", "backward"): 2**30}))
    assert main([*GRPO, "--output_dir", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "a smaller train_batch_size or gradient_checkpointing: true" in text
    assert "it does not fit" in text


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
    assert pace_lines(pace, work, steps=4)[1] == "1 min 36 s in all, 24.00 s per optimizer step, without rewards"
    assert duration(3600 * 5 + 59) == "5 h 0 min"


def test_free_memory_is_that_of_the_machine():
    free, _ = module.free_memory()
    assert 0 < free <= psutil.virtual_memory().total or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("trainer", "where", "advice"),
    [
        ("flow_grpo", ("sample", "reward"), "rewards score .* smaller rollout_batch_size or offload: .rewards"),
        ("refl", ("train", "reward"), "rewards score .* decode_slice: 1 or a smaller train_batch_size"),
        ("refl", ("held out", "decode"), "a batch of held-out images.* a smaller eval_batch_size"),
        ("diffusion_dpo", ("held out", "evaluate"), "a batch of held-out images.* a smaller rollout_batch_size"),
    ],
)
def test_a_peak_of_rewards_or_evaluations_says_what_lowers_it(trainer, where, advice):
    line = peak_line(stand_in({where: 2**30}), find_algorithm(trainer).config())
    assert re.search(advice, line), line
