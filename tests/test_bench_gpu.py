"""The bench for cards: what it counts is right, and it runs at tiny size on a CPU."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_gpu")


def test_a_frozen_base_is_charged_no_weight_gradients(bench):
    """A frozen linear layer between two that train: 2 m n k per product; its backward pass has one product, not two."""
    rows, width = 4, 8
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(3)]
    layers[1].requires_grad_(False)
    product = 2 * rows * width * width
    x = torch.randn(rows, width)
    found = bench.executed(lambda: layers[2](layers[1](layers[0](x))).sum().backward())
    # Forward 3; backward of the last: weight and input, of the frozen: input, of the first: weight.
    assert found == (3 + 2 + 1 + 1) * product


def test_every_model_and_setting_makes_a_valid_configuration(bench):
    for case in bench.CASES.values():
        assert case.size.keys() == {"published", "tiny"}
    for changes in bench.SETTINGS.values():
        bench.FlowGRPOConfig(model="random", **changes).validate()


def test_the_bench_runs_small_and_says_what_does_not_run(bench, tmp_path):
    file = tmp_path / "bench.json"
    command = [sys.executable, "scripts/bench_gpu.py", "--size", "tiny", "--models", "sd35_medium_512", "sdxl_1024"]
    command += ["--settings", "plain", "xformers", "--repeats", "1", "--write", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    models = json.loads(file.read_text())["models"]
    assert list(models) == ["sd35_medium_512", "sdxl_1024"]
    for settings in models.values():
        plain = settings["plain"]
        # Guided: 2 x 3 steps to sample, 2 x 2 to train.
        assert plain["evaluations_per_image"]["sampling"] == 6
        assert plain["evaluations_per_image"]["training"] == 4
        assert plain["share_of_matrix_peak"] > 0
        assert plain["training_flops_per_second"] > 0
        assert "xformers" in settings["xformers"]["refused"] or settings["xformers"]["images"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_published_sizes_ask_for_a_gpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "published sizes need a CUDA device" in capsys.readouterr().err
