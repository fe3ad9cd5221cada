"""``diffalign explain`` and ``diffalign completion``: options by name, and by the tabulator key."""

import subprocess

import pytest

from diffalign.cli import COMMANDS, main
from diffalign.commands.explain import explained
from diffalign.config import load_yaml
from diffalign.config.schema import leaves
from diffalign.report.metrics import METRICS, describe
from diffalign.trainers import registry
from scripts import ROOT

TRAINERS = registry.trainer_names()


def lines(capsys, *argv):
    assert main(["explain", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_option_of_every_trainer_is_explained():
    named: dict[str, dict[str, str]] = {}
    for trainer in TRAINERS:
        for leaf in leaves(registry.config_class(trainer)):
            named.setdefault(leaf.path, {})[trainer] = leaf.help
    for path, helps in named.items():
        found = list(explained(path))
        assert all(f"  {text}" in found for text in helps.values())
        assert all(any(line.startswith(f"{path}: ") and name in line for line in found) for name in helps)


def test_defaults_presets_and_configurations(capsys):
    found = lines(capsys, "--reference_weight")
    assert found[0] == "reference_weight: float|null, at least 0; default null (forward_rl)"
    assert "  0.02    dgpo" in found
    assert "presets of methods:" in found
    weight = load_yaml(ROOT / "configs/forward_rl/shapes_long.yaml")["reference_weight"]
    assert any(line.split()[0] == str(weight) and "shapes_long" in line for line in found)
    assert any(line.split() == ["5", "draft_k"] for line in lines(capsys, "recipe.gradient_steps"))
    assert any("flow_grpo_fast" in line for line in lines(capsys, "plan.window_size"))


@pytest.mark.parametrize("name", ["eval/diversity", "reward/pickscore", "eval/accuracy/counting", "time/update"])
def test_a_metric_is_explained(name, capsys):
    first, meaning, *watch = lines(capsys, name)
    assert first.startswith(f"{name}: a metric of metrics.jsonl (")
    assert meaning == f"  {describe(name).meaning}"
    assert bool(watch) == bool(describe(name).watch)


def test_a_name_of_both_kinds_and_the_legend(capsys):
    found = lines(capsys, "loss")
    assert found[1] == f"  {describe('loss').meaning}"
    assert any(line.startswith("loss: ") and "diffusion_dpo" in line for line in found[2:])
    legend = lines(capsys, "metrics")
    for metric in METRICS:
        assert (f"  {metric.name}: {metric.meaning}" in legend) == bool(metric.watch)
    assert max(map(len, legend)) < 120


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["num_step"], "no trainer has an option or a metric 'num_step'; did you mean"),
        (["kind"], "did you mean"),
        (["xyzzy"], "`diffalign train TRAINER --help` lists all"),
        ([], "explain takes one option or metric: write diffalign explain KEY"),
    ],
)
def test_an_unknown_option_is_named(argv, message, capsys):
    assert main(["explain", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("comp", ["compare", "completion"]),
        ("train refl --recipe.gradient_s", ["--recipe.gradient_steps"]),
        ("train f", ["flow_grpo", "forward_rl"]),
        ("eval x --guidance_s", ["--guidance_scale"]),
        ("configs c", ["copy"]),
        ("train refl --dry", ["--dry_run"]),
    ],
)
def test_completion_in_bash(typed, expected, tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "complete.sh"
    script.write_text(capsys.readouterr().out)
    words = ["diffalign", *typed.split(" ")]
    code = (
        f'. {script}; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _diffalign; echo "${{COMPREPLY[*]}}"'
    )
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == expected
    assert not found.stderr


def test_completion_knows_every_command(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("autoload")
    assert f'words="{" ".join(COMMANDS)}"' in script
    assert main(["completion", "fish"]) == 2
