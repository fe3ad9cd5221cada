"""Rehearsed shards hold what two processes with FSDP2 hold."""

import json
import os
import subprocess

import pytest

from diffalign.config import from_dict
from diffalign.forecast.rehearsal import BACKWARD, EVALUATE, SAMPLING, STEPPING, TRAINING, WEIGHTS, rehearse
from diffalign.models.weight_memory import Spread
from diffalign.trainers.registry import find_algorithm
from tests.conftest import PIPELINE, ROOT
from tests.forecast.test_rehearsal import TRIALS, of_100_million, settings  # noqa: F401
from tests.trainers.test_flow_grpo_processes import BIN, free_port

FULL, LORA = {"lora": {"rank": 0}, "gradient_checkpointing": True}, {"lora": {"rank": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("more", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("trainer", ["diffusion_dpo", "flow_grpo"])
def test_the_rehearsed_peak_is_that_of_two_processes(trainer, more, of_100_million, tmp_path):  # noqa: F811
    table = {
        **TRIALS[trainer],
        "model": str(of_100_million),
        "output_dir": str(tmp_path / "run"),
        "max_sequence_length": 16,
        **more,
    }
    table |= {"rewards": {"brightness": 1.0}} if trainer == "flow_grpo" else {}
    entry = find_algorithm(trainer)
    config = from_dict(entry.config, table, "test")
    found = measured({"trainer": trainer, **table}, tmp_path)
    rehearsed = rehearse(entry, config, 2, Spread(2), block=64, cpu=True)
    expected = {
        "sample": max(rehearsed.peak_of("sample"), rehearsed.peak_of("score")),
        "train": rehearsed.peak_of("train"),
    }
    for phase, peak in expected.items():
        # On a GPU the buffer of the unit that comes next and that of gradients are alive at once; gloo has one of them.
        assert 0.9 * peak <= found[phase] <= 1.08 * peak, (phase, found[phase] / peak)


def measured(table, folder):
    """The larger peaks of two processes that train with FSDP2 over gloo."""
    (folder / "settings.json").write_text(json.dumps(table))
    launcher = [BIN / "accelerate", "launch", "--config_file", ROOT / "configs/accelerate/fsdp2.yaml"]
    options = ["--num_processes", 2, "--main_process_port", free_port()]
    script = [ROOT / "tests/forecast/shard_peaks.py", folder / "settings.json", folder / "peaks"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [*map(str, [*launcher, *options, *script])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    tables = [json.loads((folder / f"peaks-{rank}.json").read_text()) for rank in (0, 1)]
    return {phase: max(one[phase] for one in tables) for phase in tables[0]}


@pytest.mark.slow
def test_units_are_gathered_only_while_they_run(tmp_path):
    entry, config = settings("flow_grpo", PIPELINE, tmp_path, lora={"rank": 0})
    one, two, eight, kept = (
        rehearse(entry, config, 2, spread) for spread in (None, Spread(2), Spread(8), Spread(8, keep=True))
    )
    for phase in (WEIGHTS, STEPPING):  # weights, moments, and in the step gradients
        assert one.peak_of(phase) > two.peak_of(phase) > eight.peak_of(phase)
    assert eight.peaks[SAMPLING, EVALUATE] - eight.peaks[SAMPLING, "decode"] > 0
    assert kept.peaks[TRAINING, BACKWARD] > eight.peaks[TRAINING, BACKWARD]
    assert kept.peaks[SAMPLING, EVALUATE] == eight.peaks[SAMPLING, EVALUATE]
