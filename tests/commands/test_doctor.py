"""``diffalign doctor``: its checks, its output, and that it detects broken parts."""

import contextlib
import logging
import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from diffalign.cli import main
from diffalign.commands.doctor import command, machine, probes
from diffalign.commands.doctor.command import DoctorConfig
from diffalign.commands.doctor.findings import Finding, run_check, verdict
from diffalign.commands.doctor.trials import check_judge, settings, trials
from diffalign.config import from_dict
from diffalign.trainers import registry
from diffalign.trainers.registry import find_algorithm, trainer_names
from tests.conftest import PIPELINE, ROOT

ASSETS = ROOT / "assets"


def statuses(findings):
    return {finding.name: finding.status for finding in findings}


def test_a_verdict_names_each_problem_with_its_fix():
    fine = [Finding("disk", "ok", "much"), Finding("xformers", "note", "not installed")]
    assert verdict(fine) == "verdict: this machine can train."
    text = verdict([*fine, Finding("torch", "problem", "1.0, needs >=2.10", "pip install 'torch>=2.10'")])
    assert text.splitlines() == [
        "verdict: 1 problem.",
        "1. torch: 1.0, needs >=2.10",
        "   fix: pip install 'torch>=2.10'",
    ]


def test_an_exception_in_a_check_is_reported_after_its_findings():
    def check():
        logging.getLogger("noise").warning("never seen")
        yield Finding("first", "ok", "fine")
        raise KeyError("second")

    found = list(run_check("parts", check))
    assert statuses(found) == {"first": "ok", "parts": "problem"}
    assert "KeyError: 'second'" in found[1].text
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize(("have", "status"), [("2.9.1", "problem"), (None, "problem"), ("2.10.0+cu128", None)])
def test_an_old_or_missing_package_is_a_problem_with_the_command_that_fixes_it(have, status, monkeypatch):
    def version(name):
        if name == "torch" and have:
            return have
        raise PackageNotFoundError(name)

    lines = ["torch>=2.10", "xformers>=0.0.32; extra == 'xformers'"]
    monkeypatch.setattr(machine, "requires", lambda name: lines)
    monkeypatch.setattr(machine, "version", version)
    found = {finding.name: finding for finding in machine.packages()}
    assert (found["torch"].status if "torch" in found else None) == status
    assert status is None or found["torch"].fix.endswith("-m pip install 'torch>=2.10'")
    assert found["xformers"].status == "note"


def test_a_full_or_locked_disk_is_a_problem(tmp_path, monkeypatch):
    (fine,) = machine.disk(tmp_path / "not/yet/there")
    assert fine.status == "ok"
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(machine, "MIN_DISK", 2**70)
    (full,) = machine.disk(tmp_path)
    assert full.status == "problem"

    def locked(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", locked)
    (refused,) = machine.disk(tmp_path)
    assert (refused.status, refused.text) == ("problem", "cannot be written: Permission denied")


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert statuses(machine.devices()) == {"GPU": "note"}
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine.Path, "exists", lambda path: True)
    assert statuses(machine.devices()) == {"GPU": "problem"}


def test_only_torchs_own_attention_must_run(monkeypatch):
    monkeypatch.setattr(probes, "refusal", lambda name, device, dtype: f"no {name}")
    found = statuses(probes.attention())
    assert [name for name, status in found.items() if status == "problem"] == ["attention native"]
    monkeypatch.undo()
    assert statuses(probes.attention())["attention native"] == "ok"


def test_a_lora_that_loads_with_other_output_is_a_problem(monkeypatch):
    assert statuses(probes.lora_round_trip(PIPELINE)) == {"LoRA round trip": "ok"}
    monkeypatch.setattr(probes, "with_tuned_weights", lambda model, folder: contextlib.nullcontext())
    assert statuses(probes.lora_round_trip(PIPELINE)) == {"LoRA round trip": "problem"}


@pytest.mark.parametrize("name", trainer_names())
def test_every_trainer_has_a_trial_that_is_valid(name, tmp_path):
    entry = find_algorithm(name)
    assert entry.trial
    args = from_dict(entry.config, settings(entry, ASSETS, tmp_path), "trial")
    args.validate()
    assert args.max_train_steps == 2
    assert args.output_dir == tmp_path


def test_a_failing_trainer_is_a_problem_and_the_next_one_runs(monkeypatch):
    entry = find_algorithm("diffusion_dpo")

    class Broken(entry.algorithm):
        def __init__(self, *args):
            raise RuntimeError("out of ink")

    monkeypatch.setitem(registry._ENTRIES, "diffusion_dpo", replace(entry, algorithm=Broken))
    first, second = trials(["diffusion_dpo", "flow_grpo"], ASSETS)
    assert (first.status, first.text) == ("problem", "RuntimeError: out of ink")
    assert second.status == "ok", second.text


@pytest.mark.slow
def test_the_trial_of_a_reward_scores_with_what_it_trained(monkeypatch):
    (found,) = trials(["reward"], ASSETS)
    assert (found.name, found.status) == ("trainer reward", "ok"), found.text
    assert "a judge" in found.text
    monkeypatch.setattr("diffalign.commands.doctor.trials.get_reward", lambda *_, **__: lambda *_: torch.ones(1))
    with pytest.raises(RuntimeError, match="the judge scores 1, and its backbone 1"):
        check_judge(SimpleNamespace(backbone="b", output_dir="o"))


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_is_1_if_there_is_a_problem(broken, code, monkeypatch, capsys):
    found = [Finding("disk", "problem" if broken else "ok", "so much", "free some")]
    monkeypatch.setattr(command, "checks", lambda config: {"disk": lambda: found})
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines()[1:3] == ["disk", f"  {found[0]}"]


def test_a_missing_embedded_world_is_a_problem(tmp_path):
    checks = command.checks(DoctorConfig(assets=tmp_path))
    assert [finding.status for finding in checks["embedded world"]()] == ["problem"]


@pytest.mark.slow
def test_this_machine_passes(capsys):
    assert main(["doctor", "--output_dir", "nowhere/yet"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("verdict: this machine can train.\n")
    assert all(f"ok trainer {name}" in text for name in trainer_names())
