"""The bench for cards: what it counts is right, and it runs at tiny size on a CPU."""

import importlib
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    return importlib.import_module("scripts.bench.gpu")


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


# A checkout of somebody's trainer, which knows one kind of model.
OTHER = """
import torch
from peft import LoraConfig

class Trainer:
    def __init__(self, pipeline, rank, targets, shape):
        self.net, self.shape = pipeline.transformer, shape
        self.net.add_adapter(LoraConfig(r=rank, target_modules=list(targets)))
        self.embeds, _, self.pooled, _ = pipeline.encode_prompt(
            ["a"], None, None, do_classifier_free_guidance=False, max_sequence_length=16
        )
        self.optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad])

    def call(self, count):
        embeds, pooled = (t.repeat(count, *[1] * (t.ndim - 1)) for t in (self.embeds, self.pooled))
        return self.net(
            hidden_states=torch.randn(count, *self.shape), timestep=torch.full((count,), 500.0),
            encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False,
        )[0]

    def step(self, images, steps, trained):
        with torch.no_grad():
            for _ in range(steps):
                self.call(2 * images)
        for _ in range(trained):
            self.call(2 * images).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
"""
ADAPTER = """
def prepare(job):
    from other import Trainer

    if not hasattr(job.pipeline, "tokenizer_3"):
        raise NotImplementedError("no such model")
    config = job.pipeline.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    trainer = Trainer(job.pipeline, job.lora_rank, job.lora_targets, shape)
    return lambda: trainer.step(job.images, job.num_steps, len(job.trained_steps))
"""


def test_the_bench_runs_small_and_says_what_does_not_run(bench, tmp_path):
    file, adapter = tmp_path / "bench.json", tmp_path / "adapter.py"
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/other.py").write_text(OTHER)
    adapter.write_text(ADAPTER)
    names = ["sd35_medium_512", "sdxl_1024", "flux1_dev_512"]
    command = [sys.executable, "scripts/bench/gpu.py", "--size", "tiny", "--models", *names, "--repeats", "1"]
    command += ["--settings", "plain", "xformers", "base_4bit", "--write", str(file)]
    command += ["--against", str(tmp_path / "checkout"), "--adapter", f"{adapter}:prepare"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    models = json.loads(file.read_text())["models"]
    assert list(models) == names
    for name, settings in models.items():
        plain = settings["plain"]
        # 3 steps to sample, 2 to train; FLUX.1-dev needs no second evaluation for its guidance.
        guided = 1 if name == "flux1_dev_512" else 2
        assert plain["evaluations_per_image"]["sampling"] == 3 * guided
        assert plain["evaluations_per_image"]["training"] == 2 * guided
        assert plain["share_of_matrix_peak"] > 0
        assert plain["training_flops_per_second"] > 0
        assert "xformers" in settings["xformers"]["refused"] or settings["xformers"]["images"]
        base = settings["base_4bit"]
        assert base.get("images") or "bitsandbytes" in base["refused"] or "CUDA" in base["refused"]
    other = models[names[0]]["against"]
    assert other["evaluations_per_image"] == {"without gradients": 6, "with gradients": 4}
    assert other["same_work"]
    ours = models[names[0]]["plain"]["images_per_second"]["iteration"]
    assert other["seconds_over_ours"] == pytest.approx(ours / other["images_per_second"])
    assert models[names[1]]["against"]["refused"] == "NotImplementedError: no such model"


def test_other_work_is_distinguished_from_the_same(bench, tmp_path):
    against = importlib.import_module("scripts.bench.against")
    net = torch.nn.Linear(2, 2)
    job = SimpleNamespace(checkout=tmp_path, pipeline=SimpleNamespace(components={"unet": net}), images=4)
    ours = {
        "evaluations_per_image": {"sampling": 2, "training": 1, "comparing": 1},
        "images_per_second": {"iteration": 1.0},
    }

    def other(sampled, taught):
        def iterate():
            with torch.no_grad():
                net(torch.zeros(4 * sampled, 2))
            net(torch.zeros(4 * taught, 2))

        return against.measure_against(lambda job: iterate, job, ours, 2, time.perf_counter)["same_work"]

    assert other(2, 1)
    assert other(3, 1)
    assert not other(1, 1)
    assert not other(4, 1)
    assert not other(2, 2)


@pytest.mark.parametrize(("adapter", "message"), [("none.py:f", "no file 'none.py'"), ("{}:g", "has no function 'g'")])
def test_a_missing_adapter_is_reported(bench, tmp_path, adapter, message):
    (tmp_path / "a.py").write_text("f = print\n")
    with pytest.raises(ValueError, match=message):
        bench.load_adapter(adapter.format(tmp_path / "a.py"))


@pytest.mark.parametrize("quantise", ["no", "4bit"])
def test_random_weights_go_without_text_encoders(bench, monkeypatch, quantise):
    """The way of published sizes, with a small pipeline in their place; the loader's quantisation needs a GPU."""
    models = importlib.import_module("scripts.bench.gpu_models")
    asked = []
    monkeypatch.setattr(models, "quantisation", lambda kind, part: asked.append((kind, part)))
    case = models.Case({"published": "tests.models.tiny_flow_pipelines:flux_dev"}, resolution=16, batch=1)
    model = models.build(case, "published", quantise)
    assert asked == ([("4bit", "transformer")] if quantise == "4bit" else [])
    conditioning = model.encode(["a", "b"])
    assert conditioning.tensors["embeds"].shape[:2] == (2, 512)
    x = torch.randn(2, *model.latent_shape())
    with torch.no_grad():
        assert model.predict(x, model.levels(3)[1], conditioning).isfinite().all()
        assert model.decode(x).shape == (2, 3, 16, 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_published_sizes_ask_for_a_gpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "published sizes need a CUDA device" in capsys.readouterr().err
