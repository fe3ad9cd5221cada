"""A run is copied to a store while it trains, and goes on from there on another machine."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign import FlowGRPOTrainer
from diffalign.runtime.tracking import MetricsLog
from tests.store import opened

WHERE, WEIGHTS = "store://b/runs/x", "pytorch_lora_weights.safetensors"


@pytest.fixture
def store(monkeypatch, tmp_path):
    return opened(monkeypatch, tmp_path / "cache")


@pytest.fixture
def train(small, train_prompts):
    def train(**changes):
        args = small(**{"checkpointing_steps": 1, **changes})
        FlowGRPOTrainer(args=args, train_dataset=train_prompts[:2]).train()
        return args

    return train


@pytest.mark.usefixtures("curves")
def test_a_run_is_copied_and_goes_on_elsewhere_bit_for_bit(store, train, tmp_path):
    args = train(max_train_steps=2, output_copy=WHERE)
    found = {name.removeprefix("/b/runs/x/") for name in store.find("/b/runs/x")}
    assert {"config.yaml", "metrics.jsonl", "train.log", "curves.png", WEIGHTS} <= found
    assert not [name for name in found if name.startswith((".", "cache"))]
    for name in ("checkpoint-2/manifest.json", "metrics.jsonl", WEIGHTS):
        assert store.cat_file(f"/b/runs/x/{name}") == (args.output_dir / name).read_bytes()
    assert yaml.safe_load(store.cat_file("/b/runs/x/config.yaml"))["output_copy"] == WHERE

    moved = train(output_dir=tmp_path / "moved", max_train_steps=3, resume_from_checkpoint="latest", output_copy=WHERE)
    stayed = train(max_train_steps=3, resume_from_checkpoint="latest")
    here, there = (load_file(run.output_dir / WEIGHTS) for run in (stayed, moved))
    assert all(torch.equal(there[name], tensor) for name, tensor in here.items())
    rows = [[row["step"] for row in MetricsLog.read(run.output_dir / "metrics.jsonl")] for run in (stayed, moved)]
    assert rows[0] == rows[1]
    kept = {name.split("/")[4] for name in store.find("/b/runs/x") if "checkpoint-" in name}
    assert kept == {"checkpoint-2", "checkpoint-3"}  # as many as checkpoints_total_limit


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("s3://KEY:topsecret@b/x", "holds credentials"),
        ("s4://b/x", "output_copy .*unknown scheme s4://"),
        ("store://b/denied", "output_copy .*no access"),
        (WHERE, "holds checkpoint-1 of a run: go on with it by --resume_from_checkpoint latest"),
        ("run/copy", "overlaps with output_dir"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_the_model_loads(target, message, store, train, monkeypatch):
    store.pipe_file("/b/runs/x/checkpoint-1/manifest.json", b"{}")
    if target.endswith("denied"):
        type(store).failing, type(store).error = {"pipe_file"}, PermissionError("403 Forbidden")
    monkeypatch.setattr("diffalign.trainers.base.load", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message) as raised:
        train(output_copy=target, output_dir=Path("run"))
    assert "topsecret" not in str(raised.value)
