"""Configurations and the embedded world are found in a clone, from another folder, and in an installed package."""

import shutil
from pathlib import Path

import pytest
import yaml

from diffalign import FlowGRPOConfig, embedded
from diffalign.cli import main
from diffalign.config import parse
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT

PROMPTS = Path("assets/prompts/shapes_train.jsonl")


@pytest.fixture(params=["clone", "package"])
def home(request, tmp_path_factory, monkeypatch):
    """The folder of configs/ and assets/: this clone, or a copy as a wheel has it, seen from an empty folder."""
    found = ROOT
    if request.param == "package":
        found = tmp_path_factory.mktemp("site-packages") / "diffalign"
        found.mkdir()
        shutil.copytree(ROOT / "configs", found / "configs")
        for name in ("assets/shapes-sd3", "assets/prompts", "assets/judges"):
            (found / name).parent.mkdir(exist_ok=True)
            (found / name).symlink_to(ROOT / name)
        monkeypatch.setattr(embedded, "PACKAGE", found)
    embedded.root.cache_clear()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield found
    embedded.root.cache_clear()


def test_a_configuration_by_name_finds_its_files(home):
    entry = find_algorithm("flow_grpo")
    config = parse(entry.config, ["--config", "flow_grpo/shapes", "--max_train_steps", "3"])
    assert config.model == str(home / "assets/shapes-sd3")
    assert config.train_prompts == home / PROMPTS
    assert config.output_dir == Path("runs/shapes")
    assert FlowGRPOConfig.from_yaml("flow_grpo/shapes").train_prompts == config.train_prompts


def test_names_of_models(home):
    assert FlowGRPOConfig(model="shapes-sd3").model == str(home / "assets/shapes-sd3")
    assert FlowGRPOConfig(model="stabilityai/sdxl").model == "stabilityai/sdxl"
    assert FlowGRPOConfig(model="m", output_dir="assets/prompts").output_dir == Path("assets/prompts")


def test_files_of_the_working_folder_come_first(home):
    PROMPTS.parent.mkdir(parents=True)
    PROMPTS.write_text("")
    assert FlowGRPOConfig(model="m", train_prompts=PROMPTS).train_prompts == PROMPTS
    missing = Path("assets/prompts/none.jsonl")
    assert FlowGRPOConfig(model="m", train_prompts=missing).train_prompts == missing
    query = Path(f"{PROMPTS}?limit=3")
    assert FlowGRPOConfig(model="m", train_prompts=query).train_prompts == query
    PROMPTS.unlink()
    assert FlowGRPOConfig(model="m", train_prompts=query).train_prompts == home / query


def test_configurations_are_listed_and_copied(home, capsys):
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in listed]
    assert names == sorted(str(p.relative_to(ROOT / "configs"))[:-5] for p in (ROOT / "configs").rglob("*.yaml"))
    assert all(len(line.split(maxsplit=1)[1]) > 5 for line in listed)

    assert main(["configs", "copy", "refl/sdxl"]) == 0
    assert capsys.readouterr().out.strip() == "diffalign train refl --config sdxl.yaml"
    copy, source = Path("sdxl.yaml").read_text(), (home / "configs/refl/sdxl.yaml").read_text()
    assert yaml.safe_load(copy) == yaml.safe_load(source)
    assert copy.splitlines()[1:] == source.splitlines()[1:]
    assert Path(copy.splitlines()[0].split("$schema=")[1]).is_file()
    assert main(["configs", "path", "accelerate/cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(home / "configs/accelerate/cpu.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["copy", "refl/none"], "there is no configuration 'refl/none': `diffalign configs` lists all"),
        (["copy", "../pyproject"], "there is no configuration"),
        (["copy", "refl/sdxl", "there.yaml"], "there.yaml exists: name another file"),
        (["remove", "refl/sdxl"], "configs remove refl/sdxl: write diffalign configs"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine")
    assert main(["configs", *argv]) == 2
    assert message in capsys.readouterr().err
    assert Path("there.yaml").read_text() == "mine"
