"""Help and errors of configurations need none of the libraries that take seconds to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign
import diffalign.trainers
from tests.config_classes import CLASSES

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "numpy", "matplotlib", "pyarrow")
PROGRAM = """
import sys
from diffalign.cli import main
heavy = {heavy!r}
for argv in {commands!r}:
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    print("#", code, [name for name in heavy if name in sys.modules], file=sys.stderr)
"""
COMMANDS = [
    ["--help"],
    [],
    ["--version"],
    ["trian"],
    ["train"],
    ["train", "ppo"],
    *([*command.split(), "--help"] for command in CLASSES),
    *([*command.split(), "--output_dr", "x"] for command in CLASSES),
    *([*command.split(), "--config", "nowhere.yaml"] for command in CLASSES),
    ["train", "flow_grpo", "--seed", "one"],
    ["train", "flow_grpo", "--train_prompts", "nowhere.txt"],
    ["train", "refl", "--model", "./nowhere", "--rewards", "shaps"],
    ["train", "diffusion_dpo", "--train_data", "nowhere.parquet"],
    ["eval", "nowhere"],
    ["compare", "nowhere", "--prompts", "nowhere.txt"],
    ["bench", "geneval", "./nowhere"],
    ["bench", "genval", str(ROOT / "assets/shapes-sd3")],
    ["rank", "nowhere", "--prompts", "nowhere.txt"],
    ["score", "nowhere.png", "--rewards", "shapes"],
    ["check", "nowhere.parquet"],
    ["relabel", "nowhere.parquet", "--rewards", "shapes"],
    ["label", "nowhere"],
    ["label", "a=nowhere"],
    ["label", "nowhere.parquet", "--num_steps", "3"],
    ["doctor", "--assets", "nowhere"],
]


def run(program):
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_and_mistakes_import_nothing_heavy():
    """One process, so that a command that imports something shows in its own line and all later ones."""
    done = run(PROGRAM.format(heavy=HEAVY, commands=COMMANDS))
    lines = [line for line in done.stderr.splitlines() if line.startswith("#")]
    assert len(lines) == len(COMMANDS), done.stderr
    for argv, line in zip(COMMANDS, lines, strict=True):
        right = 0 if "--help" in argv or argv == ["--version"] else 2
        assert line == f"# {right} []", argv
    assert "Traceback" not in done.stderr


def test_importing_the_package_imports_nothing_heavy():
    done = run(f"import sys, diffalign; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("package", [diffalign, diffalign.trainers], ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported_and_is_known_to_type_checkers(package):
    tree = ast.parse(Path(package.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in checked.body for alias in node.names}
    assert typed == set(package.__all__) == set(package._HOMES)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
        _ = package.nothing_of_the_kind


@pytest.mark.slow
def test_submodules_are_attributes_as_before():
    done = run("import diffalign; print(diffalign.rewards.get_reward('shapes').name, diffalign.trainers.__name__)")
    assert done.stdout.split() == ["shapes", "diffalign.trainers"], done.stderr


LABEL = """
import json, sys
from pathlib import Path
from diffalign.commands.label import command, web
command.serve = lambda config, sitting, token: print(len(sitting.pairs), web.build_app(sitting, token, print) and "app")
from diffalign.cli import main
folder = Path({folder!r})
row = {{"prompt": "p", "image_0": "a.png", "image_1": "b.png"}}
(folder / "pairs.jsonl").write_text(json.dumps(row) + chr(10))
for source in (folder / "pairs.jsonl", {parquet!r}):
    main(["label", str(source), "--output_dir", str(folder / "out")])
    print([name for name in {heavy!r} if name in sys.modules])
"""


def test_the_label_server_starts_without_torch_and_datasets(tmp_path):
    heavy = [name for name in HEAVY if name not in ("numpy", "pyarrow")]
    parquet = str(ROOT / "assets/preferences/shapes.parquet")
    done = run(LABEL.format(folder=str(tmp_path), parquet=parquet, heavy=heavy))
    lines = [line for line in done.stdout.splitlines() if not line.startswith("no answers")]
    assert lines == ["1 app", "[]", "2400 app", "[]"], done.stderr
