"""The README's examples run as they stand; its installation, quickstart and loading are run by .ci/run."""

import re
import shlex
from pathlib import Path

import pytest

from diffalign.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    """Code blocks that no comment hands to .ci/run."""
    marked = re.findall(r"<!-- ci: \w+ -->\n```\w+\n.*?```", README, re.DOTALL)
    text = README
    for block in marked:
        text = text.replace(block, "")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [block for block in blocks("python") if "FlowGRPOTrainer" in block]
    exec(compile(example.replace("runs/redness", str(tmp_path)), "README.md", "exec"), {})
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("command", blocks("bash"))
def test_every_command_trains(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert "accelerate launch" in command
    if "--config_file" in words:
        assert Path(words[words.index("--config_file") + 1]).is_file()
    place = next(i for i, word in enumerate(words) if word.startswith("scripts/train_"))
    trainer = words[place].removeprefix("scripts/train_").removesuffix(".py")
    small = {"num_groups": 2, "group_size": 4, "max_train_steps": 1, "eval_prompts": "null", "output_dir": tmp_path}
    small |= {"num_pairs": 2, "data.scan": 2} if trainer == "diffusion_dpo" else {}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert main(["train", trainer, *words[place + 1 :], *options]) == 0
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("name", ["quickstart", "load", "compare", "doctor", "check", "score", "tests"])
def test_the_blocks_that_ci_runs_are_there(name):
    assert re.search(rf"<!-- ci: {name} -->\n```\w+\n.+?```", README, re.DOTALL)


def test_pictures_and_files_exist():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).is_file(), target
