"""An algorithm in one file outside the package trains, resumes bit-exactly, dry-runs, is tried and has a help text."""

import json

import pytest

from diffalign.cli import main
from diffalign.commands.doctor.trials import trials
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers import registry
from tests.conftest import PIPELINE, PROMPTS, ROOT
from tests.reliability.compare import same_checkpoint

CODE = """\
import dataclasses

import torch

from diffalign.config import option
from diffalign.models.weights import POLICY
from diffalign.rollout.config import AdvantageConfig, RolloutConfig
from diffalign.rollout.forward_process import ForwardProcess, TimeSampling
from diffalign.runtime.interfaces import MicroBatch, MiniBatch
from diffalign.trainers.registry import register_algorithm
from diffalign.trainers.rollouts import RolloutAlgorithm


@dataclasses.dataclass(kw_only=True)
class WeightedConfig(AdvantageConfig, RolloutConfig):
    temperature: float = option(1.0, "scale of the advantages in the weights", section="loss", gt=0)


@register_algorithm("weighted", config=WeightedConfig, trial=TRIAL)
class Weighted(RolloutAlgorithm[WeightedConfig]):
    def minibatches(self, batch, iteration):
        rows = torch.arange(len(batch.buffer.leaves))
        yield MiniBatch([MicroBatch(part, len(part) / len(rows), batch) for part in rows.split(4)], rows)

    def predicted(self, batch, rows):
        leaves = batch.buffer.leaves[rows]
        texts = [batch.buffer.prompts[g].text for g in batch.buffer.group[leaves].tolist()]
        forward, step = ForwardProcess(self.run, TimeSampling()), self.run.progress.iteration
        noised = forward.noise(batch.buffer.latents(leaves), leaves.tolist(), step)
        conditioning = forward.conditioning(texts, leaves.tolist(), step)
        return forward.predict(noised, conditioning)[POLICY], noised.target, batch.buffer.advantage[leaves]

    def loss(self, micro):
        output, target, advantage = self.predicted(micro.data, micro.rows)
        error = (output - target).square().flatten(1).mean(1)
        return ((advantage / self.config.temperature).exp() * error).mean(), {"error": error.detach().mean()}

    def probe(self, batch):
        return [self.predicted(batch, torch.arange(2))[0]]
"""
TRIAL = {"num_groups": 1, "group_size": 4, "rollout_batch_size": 4, "rewards": {"jpeg_compressibility": 1.0}}
TRIAL |= {"train_prompts": str(PROMPTS / "shapes_train.jsonl"), "plan": {"preset": "ode", "num_steps": 2}}
TRIAL |= {"shared_start": False}
SETTINGS = TRIAL | {"model": str(PIPELINE), "max_sequence_length": 16, "lora": {"rank": 2}, "learning_rate": 1e-3}
SETTINGS |= {"max_train_steps": 4, "checkpointing_steps": 2, "temperature": 2.0}


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    (tmp_path / "own.py").write_text(CODE.replace("TRIAL", repr(TRIAL)))
    (tmp_path / "run.yaml").write_text(json.dumps(SETTINGS))
    return ["train", f"{tmp_path}/own.py:weighted", "--config", str(tmp_path / "run.yaml"), "--output_dir"]


def test_it_trains_and_resumes_bit_exactly(command, tmp_path, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main([*command, str(straight)]) == 0
    rows = [row for row in MetricsLog.read(straight / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 4
    assert all("error" in row for row in rows)

    assert main([*command, str(resumed), "--resume_from_checkpoint", str(straight / "checkpoint-2")]) == 0
    same_checkpoint(straight / "checkpoint-4", resumed / "checkpoint-4")
    assert f"{tmp_path}/own.py:weighted" in (straight / "README.md").read_text()


def test_its_dry_run_and_help_need_no_edit_elsewhere(command, tmp_path, capsys):
    assert main([*command, str(tmp_path / "dry"), "--dry_run"]) == 0
    assert "algorithm weighted registers no cost" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()

    assert main([*command[:2], "--help"]) == 0
    assert "scale of the advantages in the weights" in capsys.readouterr().out


def test_the_doctor_tries_it_once_it_is_registered(command, tmp_path):
    registry.find_algorithm(command[1], allow_code=True)
    assert "weighted" in registry.algorithm_names()
    (finding,) = trials(["weighted"], ROOT / "assets")
    assert finding.status == "ok", finding


@pytest.mark.parametrize(
    ("code", "message"),
    [("x = 1", "registers no algorithm 'weighted'"), ("import nothing_of_this_name", "cannot be loaded")],
)
def test_code_that_is_none_is_refused(code, message, tmp_path, capsys):
    (tmp_path / "own.py").write_text(code)
    assert main(["train", f"{tmp_path}/own.py:weighted", "--help"]) == 2
    assert message in capsys.readouterr().err
