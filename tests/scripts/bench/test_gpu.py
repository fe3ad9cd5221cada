"""The bench for GPUs runs at tiny size on a CPU, and counts what runs."""

import importlib
import itertools
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT
from tests.phases import collect, update


@pytest.fixture
def bench():
    return importlib.import_module("scripts.bench.gpu")


def test_every_trainer_model_and_setting_makes_a_valid_configuration(bench, tmp_path):
    runs = importlib.import_module("scripts.bench.gpu_runs")
    for trainer, case in itertools.product(runs.RUNS, bench.CASES.values()):
        for setting in bench.SETTINGS:
            try:
                changes = bench.changes_of(trainer, setting)
            except ValueError as error:
                assert setting == bench.BATCHED, error  # noqa: PT017
                continue
            for size in ("published", "tiny"):
                try:
                    runs.configuration(trainer, case, size, changes, str(tmp_path)).validate()
                except ValueError as error:
                    assert setting in str(error) or "overlap_rewards" in str(error), error  # noqa: PT017


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


@pytest.fixture
def measured(bench, tmp_path, monkeypatch):
    """Return a function that runs the bench at tiny size, and returns its rows by model."""

    def run(*arguments):
        file = tmp_path / "bench.json"
        monkeypatch.setattr(
            sys, "argv", ["gpu.py", "--size", "tiny", "--repeats", "1", "--write", str(file), *arguments]
        )
        bench.main()
        return json.loads(file.read_text())["models"]

    return run


@pytest.mark.slow
def test_flow_grpo_is_measured_beside_other_code(measured, tmp_path):
    adapter = tmp_path / "adapter.py"
    (tmp_path / "other.py").write_text(OTHER)
    adapter.write_text(ADAPTER)
    loops = [ROOT / f"scripts/bench/{name}.py" for name in ("flow_grpo_loop", "diffusers_loop")]
    adapters = [f"{file}:prepare" for file in (adapter, *loops)]
    options = ["--settings", "plain", "--against", str(tmp_path), "--adapter", *adapters]
    rows = measured("--models", "sd35_medium_512", *options)["sd35_medium_512"]
    # 3 steps to sample, 2 to train, with two evaluations for guidance.
    assert rows["plain"]["evaluations_per_image"] == {"sampling": 6, "training": 4, "comparing": 0}
    assert_complete(rows["plain"])
    ours = rows["plain"]["images_per_second"]["iteration"]
    for spec in adapters:
        other = rows[f"against {spec}"]
        assert other["evaluations_per_image"] == {"without gradients": 6, "with gradients": 4}
        assert other["same_work"]
        assert other["seconds_over_ours"] == pytest.approx(ours / other["images_per_second"])


def test_what_does_not_run_is_recorded_with_its_reason(measured):
    loop = str(ROOT / "scripts/bench/diffusers_loop.py:prepare")
    options = ["--settings", "plain", "base_4bit", "--against", str(ROOT), "--adapter", loop]
    rows = measured("--models", "flux1_dev_512", *options)["flux1_dev_512"]
    # FLUX.1-dev needs no second evaluation for its guidance.
    assert rows["plain"]["evaluations_per_image"] == {"sampling": 3, "training": 2, "comparing": 0}
    assert_complete(rows["plain"])
    base = rows["base_4bit"]
    assert base.get("images") or "bitsandbytes" in base["refused"] or "CUDA" in base["refused"]
    assert "NotImplementedError" in rows[f"against {loop}"]["refused"]


def assert_complete(row):
    """A row has rates, memory, and what the rehearsal adds."""
    assert row["peak_memory_gib"] > 0
    assert row["rehearsed_memory_gib"] > 0
    assert row["images_per_second"]["iteration"] > 0
    assert row["share_of_matrix_peak"]["training"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_diffusion_dpo_does_the_work_of_the_loop_of_diffusers(measured):
    spec = str(ROOT / "scripts/bench/dpo_loop.py:prepare")
    rows = measured(
        *("--trainer", "diffusion_dpo", "--models", "sdxl_1024", "--settings", "plain"),
        *("--against", str(ROOT), "--adapter", spec),
    )["sdxl_1024"]
    assert_complete(rows["plain"])
    other = rows[f"against {spec}"]
    assert other["evaluations_per_image"] == {"without gradients": 2, "with gradients": 2}
    assert other["same_work"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("trainer", "settings"),
    [pytest.param("forward_rl", ["plain", "batched_times"], marks=pytest.mark.slow), ("refl", ["plain"])],
)
def test_other_trainers_are_measured(measured, trainer, settings):
    rows = measured("--trainer", trainer, "--models", "sd35_medium_512", "--settings", *settings)["sd35_medium_512"]
    for setting in settings:
        assert_complete(rows[setting])
    if trainer == "forward_rl":
        assert rows["plain"]["loss"] == pytest.approx(rows["batched_times"]["loss"], rel=1e-4)


def test_rehearsed_operations_are_those_that_run(bench, tmp_path):
    """Of the matrix products of a training pass, which the counter of torch sees, and attention, which it does not."""
    runs = importlib.import_module("scripts.bench.gpu_runs")
    case = bench.CASES["sdxl_1024"]
    found = runs.rehearsed("diffusion_dpo", case, "tiny", {})["flops"]["training"]
    measured = runs.Bench("diffusion_dpo", case, "tiny", {}, str(tmp_path))
    trainer = measured.trainer
    batch = collect(trainer)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        update(trainer, batch)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_other_work_is_distinguished_from_the_same(bench, tmp_path):
    against = importlib.import_module("scripts.bench.against")
    net = torch.nn.Linear(2, 2)
    common = {"batch": 4, "resolution": 8, "lora_rank": 1, "lora_targets": (), "learning_rate": 0.0, "precision": "no"}
    common |= {"checkout": tmp_path, "pipeline": SimpleNamespace(components={"unet": net}), "prompts": ("a",) * 4}
    rest = {"num_steps": 2, "trained_steps": (0,), "noise_level": 1.0, "guidance_scale": 1.0, "reward": len}
    rollouts = against.RolloutJob(**common, group_size=1, **rest)
    ours = {
        "evaluations_per_image": {"sampling": 2, "training": 1, "comparing": 1},
        "images_per_second": {"iteration": 1.0},
    }

    def other(sampled, taught, job=rollouts):
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
    pairs = against.PreferenceJob(**common, beta=1.0)
    assert other(3, 1, pairs), "a reference is no choice"
    assert not other(2, 1, pairs)


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
    folder = models.small_pipeline("tests.models.tiny_flow_pipelines:flux_dev")
    case = models.Case(str(folder), "", resolution=16, batch=1)
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
