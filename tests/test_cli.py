"""The command line: what it runs and how it says no."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign
from diffalign.cli import COMMANDS, main
from diffalign.config.schema import leaves, type_name
from diffalign.trainers.registry import trainer_names
from tests.config_classes import CLASSES

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs/flow_grpo/shapes.yaml")


def test_a_missing_torch_is_said_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: no such file')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ran = subprocess.run([sys.executable, "-m", "diffalign", "doctor"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    said = "diffalign: torch cannot be imported: libcudart.so.12: no such file: try pip install torch\n"
    assert ran.stderr == said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--plan.num_step", "4"], "unknown key 'plan.num_step'; did you mean 'plan.num_steps'?"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", QUICKSTART, "--group_size", "1"], "a lone image has no group"),
        (["--config", QUICKSTART, "--model", "./nowhere"], "model ./nowhere: no such folder"),
        (["--config", QUICKSTART, "--train_prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_run_is_said_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["train", "flow_grpo", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_every_field(capsys):
    assert main(["train", "flow_grpo", "--help"]) == 0
    text = capsys.readouterr().out
    for field in ("--group_size", "--plan.window_size", "--lora.rank", "--resume_from_checkpoint"):
        assert field in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "diffalign: name a command"),
        (["tune"], "there is no command 'tune'"),
        (["trian", "flow_grpo"], "there is no command 'trian'; did you mean train?"),
        (["it's"], "there is no command"),
        (["--verbose"], "unrecognized arguments: --verbose"),
        (["train", "flow_gpro"], "did you mean flow_grpo?"),
        (["x" * 9000], "there is no command"),
    ],
)
def test_a_wrong_command_is_named_with_the_closest(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 5000


def test_the_help_names_every_command_and_trainer(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (*COMMANDS, *trainer_names()):
        assert name in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{diffalign.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(name, option, capsys):
    assert main([name, option]) == 0
    assert capsys.readouterr().out.startswith("usage: diffalign ")


@pytest.mark.parametrize("command", CLASSES)
@pytest.mark.parametrize("width", [40, 80, 120])
def test_help_of_options_fits_the_terminal(command, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    first, *lines = text.splitlines()
    assert first.startswith("usage: diffalign ")
    assert command.split()[0] in first.split()[2].split("|")
    assert "examples:" in lines
    assert "most used options:" in lines
    assert not [line for line in lines if len(line) > width and len(line.split()) > 1]


@pytest.mark.parametrize("command", CLASSES)
def test_help_shows_type_default_and_range_of_each_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in leaves(CLASSES[command]):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  --{leaf.path} ")]
        assert line.startswith(f"  --{leaf.path} {type_name(leaf.hint)} ")
        assert " = " in line or "(required)" in line
        limited = leaf.range.ge is not None or leaf.range.gt is not None
        assert (("at least" in line) or ("more than" in line)) == limited


@pytest.mark.parametrize("argv", [[], ["tune"], ["train"], ["train", "ppo"]])
def test_unknown_commands_name_the_known(argv, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "flow_grpo" in captured.out + captured.err


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffalign", "train", "flow_grpo", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("diffalign", run_name="__main__")
    assert stopped.value.code == 0
    assert "--dry_run" in capsys.readouterr().out


@pytest.mark.slow  # the README's quickstart does it at every check
def test_the_launcher_trains_through_accelerate(tmp_path):
    """As the README starts it, with a run folder of its own and two steps."""
    small = ["--num_groups", "2", "--group_size", "4", "--max_train_steps", "2", "--eval_prompts", "null"]
    command = ["accelerate.commands.launch", "--num_processes", "1", str(ROOT / "scripts/train_flow_grpo.py")]
    run = subprocess.run(
        [sys.executable, "-m", *command, "--config", QUICKSTART, "--output_dir", str(tmp_path / "run"), *small],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 4),
    ],
)
def test_a_users_number_of_threads_is_kept_and_a_launchers_is_not(monkeypatch, environment, expected):
    from diffalign.cli import use_all_cores

    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)

    use_all_cores()

    assert chosen == ([] if expected is None else [expected])
