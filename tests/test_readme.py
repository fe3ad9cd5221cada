"""The README files: examples run, commands parse, links resolve, tables and figures match the files of record.

Installation, quickstart and loading are run by .ci/run.
"""

import re
import shlex
from importlib.metadata import EntryPoints
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign.cli import COMMANDS, DRY_RUN, main, take_switch
from diffalign.config import parse
from diffalign.diffusion import plan
from diffalign.diffusion.reward_gradient_presets import PRESETS as RECIPES
from diffalign.lazy import load
from diffalign.losses.registry import PREFERENCE_LOSSES
from diffalign.models.registry import family_names
from diffalign.rewards import base, get_reward
from diffalign.trainers.registry import algorithm_names, config_class
from scripts.build import hero, tables
from scripts.studies.policy_methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())  # one line, as sentences are wrapped
DOCUMENTS = ("README.md", "configs/README.md", "assets/results/README.md", "diffalign/rewards/README.md")
MAX_LINES, MAX_WIDTH = 280, 150


def blocks(language, text=README, marked=False):
    """Code blocks of a language; without ``marked`` those that no comment hands to .ci/run."""
    if not marked:
        text = re.sub(r"<!-- ci: \w+ -->\n```\w+\n.*?```", "", text, flags=re.DOTALL)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text, marked=False):
    """The commands of all bash blocks, continuation lines joined, each as a list of words."""
    lines = "\n".join(blocks("bash", text, marked)).replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def launched(words):
    """(trainer, options) of a command that launches one, or None."""
    for index, word in enumerate(words):
        if word.startswith("scripts/train_"):
            return word.removeprefix("scripts/train_").removesuffix(".py"), words[index + 1 :]
    return None


def trains_on_the_cpu(words):
    return launched(words) is not None and any("/shapes" in word for word in words)


def check_command(words):
    """Fail unless the command's program, files and options exist."""
    if "--config_file" in words:
        assert Path(words[words.index("--config_file") + 1]).is_file()
    trainer = launched(words)
    if words[:2] == ["diffalign", "train"]:
        trainer = words[2], take_switch(words[3:], DRY_RUN)[1]
    if trainer:
        parse(config_class(trainer[0]), trainer[1])
    elif words[0] == "diffalign":
        command = COMMANDS[words[1]]
        parse(load(command.config), words[2:], command.positional)
    elif words[0] == "python":
        source = Path(words[1]).read_text()
        assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--"))
    else:
        assert words[0] in ("pip", "pytest")


def test_the_python_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [block for block in blocks("python") if "FlowGRPOTrainer" in block]
    exec(compile(example.replace("runs/redness", str(tmp_path)), "README.md", "exec"), {})
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_the_reward_example_is_found_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "REWARDS", dict(base.REWARDS))
    monkeypatch.setattr(base, "entry_points", lambda group: EntryPoints())
    (example,) = [block for block in blocks("python") if "@register" in block]
    assert len([line for line in example.splitlines() if line]) <= 6
    (tmp_path / "my_rewards.py").write_text(example)
    red = get_reward(f"{tmp_path}/my_rewards.py:redness", allow_code=True, strength=2.0)
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0] = 1
    assert red(image, [""], [{}]).tolist() == [2.0]


@pytest.mark.parametrize("words", [words for words in commands(README) if trains_on_the_cpu(words)], ids=" ".join)
def test_every_command_on_the_embedded_world_trains(words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    trainer, given = launched(words)
    small = {"max_train_steps": 1, "eval_prompts": "null", "output_dir": tmp_path}
    offline = trainer == "diffusion_dpo"  # it has pairs in the place of groups
    small |= {"num_pairs": 2, "data.scan": 2} if offline else {"num_groups": 2, "group_size": 4}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert main(["train", trainer, *given, *options]) == 0
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_all_three_trainers_are_shown_on_the_cpu():
    assert {launched(words)[0] for words in commands(README) if trains_on_the_cpu(words)} == set(algorithm_names())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands((ROOT / document).read_text(), marked=True)
    assert found
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "diffalign compare runs/shapes --limits 24",
        "diffalign train flow_grpo --config configs/flow_grpo/gone.yaml",
        "accelerate launch scripts/train_refl.py --config configs/refl/shapes.yaml --recipe.presets draft_1",
        "accelerate launch --config_file configs/accelerate/gone.yaml scripts/train_refl.py",
        "python scripts/studies/trust.py --rowz 2",
        "python scripts/gone.py",
        "unknown command",
    ],
)
def test_a_command_that_cannot_run_is_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, OSError)):
        check_command(shlex.split(line))


@pytest.mark.parametrize("name", ["quickstart", "load", "compare", "doctor", "check", "score", "tests"])
def test_the_blocks_that_ci_runs_are_there(name):
    assert len(re.findall(rf"<!-- ci: {name} -->\n```\w+\n.+?```", README, re.DOTALL)) == 1


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document):
    path = ROOT / document
    text = path.read_text()
    for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(
        r"(?:configs|scripts|assets|diffalign|tests)/[\w/.-]+\.(?:py|yaml|md|png|csv|json)\b", text
    ):
        assert any((root / target).is_file() for root in (ROOT, path.parent)), target


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    assert not [line for line in lines if len(line) > MAX_WIDTH and not line.startswith("|")]


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert tables.MARKED.search(text)
    assert text == tables.render(text), "run python scripts/build/tables.py"


def test_a_stale_table_is_rewritten():
    text = "<!-- table: speed -->\n| old |\n<!-- end -->\n"
    assert tables.render(text) == f"<!-- table: speed -->\n{tables.speed()}\n<!-- end -->\n"
    with pytest.raises(KeyError):
        tables.render(text.replace("speed", "unknown"))


def test_the_figures_of_the_readme_are_those_on_disk():
    trust, flow = tables.results("trust"), tables.results("bench_flow_grpo")
    tuned = [100 * run[-1]["accuracy"] for run in tables.evaluations("flow_grpo_shapes")]
    assert f"**+{tables.gain('flow_grpo_shapes')}** points" in PROSE
    assert f"to {tables.repeat_seeds.spread(tuned)} %" in PROSE
    long = [100 * run[-1]["accuracy"] for run in tables.evaluations("flow_grpo_shapes_long")]
    assert f"to {tables.repeat_seeds.spread(long)} %" in PROSE
    assert tables.gain("refl_shapes_draft_k") in PROSE
    for name in ("forward_rl_shapes", "forward_rl_shapes_sd", "forward_rl_shapes_edit"):
        nft = [100 * row["accuracy"] for row in tables.tests(name) if row["weights"] == "tuned"]
        assert f"to {tables.repeat_seeds.spread(nft)} %" in PROSE
    assert f"takes **{flow['ratio']:.2f}** times" in PROSE
    assert f"**{trust['kills_survived']} of {trust['kills']}**" in PROSE
    assert f"{trust['resume_points_exact']} of {trust['resume_points']} stop points" in PROSE
    for name in ("python", "torch", "diffusers", "accelerate", "peft"):
        assert re.search(rf"\b{name} {re.escape(trust['versions'][name])}\b", PROSE, re.IGNORECASE)
    losses = {row.split(" | ")[0]: row for row in tables.study("losses").replace("| ", "", 1).splitlines()}
    assert losses["| dpo"].split(" | ")[2] in PROSE
    assert losses["| kto"].split(" | ")[2] in PROSE
    assert f"{len(losses) - 2} variants of losses" in PROSE
    images = tables.study("policy_methods").partition("**6,144 images**")[2].partition("\n**")[0]
    methods = dict(line.split(" | ")[:2] for line in images.splitlines() if " | " in line)
    for row, name in (("nft, guided anchor", "NFT with a guided anchor"), ("crd", "CRD"), ("awm", "AWM"),
                      ("flow_grpo", "Flow-GRPO")):  # fmt: skip
        assert f"{name} {methods[f'| {row}']} %" in PROSE
    for group in (("branch_grpo", "tempflow_branch", "g2", "tree_rpo"), ("spo", "tailorpo", "d3po")):
        means = sorted(methods[f"| {row}"].split()[0] for row in group)
        assert f" {means[0]} to {means[-1]} %" in PROSE
    assert f"{len(METHODS)} methods at 6,144 images" in PROSE


def test_the_counts_of_the_readme_are_those_of_the_registries():
    plans = len(plan.PRESETS) - 1  # "ode" trains no step
    rewards = len(tables.reward_table().splitlines()) - 2
    counted = (
        f"{len(algorithm_names())} trainers, **{len(PREFERENCE_LOSSES)}** preference losses, {len(RECIPES)} "
        f"reward-gradient recipes, {plans} policy-gradient plans, {rewards} rewards, "
        f"{len(family_names())} model families"
    )
    assert counted in PROSE
    assert all(f"`{name}`" in PROSE for name in family_names())


def test_every_plan_and_recipe_is_described():
    text = (ROOT / "configs/README.md").read_text()
    assert not [name for name in (*plan.PRESETS, *RECIPES, *PREFERENCE_LOSSES) if f"`{name}`" not in text]


def test_the_first_picture_shows_what_its_caption_says():
    found = hero.chosen()
    assert 6 <= len(found) <= 8
    assert all(tuned for _, _, (_, tuned) in found)
    assert sum(not before for _, _, (before, _) in found) >= len(found) / 2
    width, height = Image.open(hero.PICTURE).size
    assert width > 2 * height
