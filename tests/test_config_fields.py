"""Every field of every configuration class is documented and bounded; help, schema and resume rules follow from it."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import pytest

from diffalign.cli import main
from diffalign.config import describe, free_fields, from_dict, given_names, load_yaml, to_dict
from diffalign.config.help import ESSENTIAL, OTHER, SECTIONS
from diffalign.config.json_schema import json_schema, schema_text
from diffalign.config.ranges import RANGE
from diffalign.config.renamed import REMOVED, RENAMED
from diffalign.config.schema import arms_of, config_arm, init_fields, leaves
from diffalign.config.sections import RewardConfig
from diffalign.config.unread import refuse_unread
from diffalign.trainers.registry import algorithm_names, config_class, trainer_names
from tests.config_classes import CLASSES

ROOT = Path(__file__).parents[1]


def sections_of(cls):
    """A configuration class and those of its sections."""
    yield cls
    for _, hint in init_fields(cls):
        if (arm := config_arm(hint)) is not None:
            yield from sections_of(arm)


EVERY = sorted({own for cls in (*CLASSES.values(), RewardConfig) for own in sections_of(cls)}, key=lambda c: c.__name__)


def holds_numbers(hint):
    return any(arm in (int, float) or any(map(holds_numbers, typing.get_args(arm))) for arm in arms_of(hint))


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_every_field_has_help_and_every_number_a_range(cls):
    for field, hint in init_fields(cls):
        help_text = field.metadata.get("help", "")
        assert len(help_text) > 3, field.name
        assert help_text[-1] != ".", field.name
        if holds_numbers(hint):
            assert RANGE in field.metadata, field.name


@pytest.mark.parametrize("command", CLASSES)
def test_every_option_has_a_known_section(command):
    for leaf in leaves(CLASSES[command]):
        assert leaf.section in SECTIONS, leaf.path


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", CLASSES)
def test_help_has_usage_examples_the_options_that_matter_and_sections(command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    cls = CLASSES[command]
    lines = describe(cls).splitlines()
    assert lines[0].startswith("usage: diffalign")
    assert sum(line.startswith("  diffalign ") for line in lines) == 2
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:2] == ["examples", ESSENTIAL]
    assert OTHER not in headings
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert sorted(shown) == sorted(leaf.path for leaf in leaves(cls))
    if command.startswith("train"):
        assert len(cls.essential) == 10
    assert shown[: len(cls.essential)] == list(cls.essential)
    assert all(len(line) <= width or " " not in line.strip() for line in lines)


@pytest.mark.parametrize("trainer", trainer_names())
def test_the_examples_of_help_are_valid_options(trainer, monkeypatch):
    import shlex

    from diffalign.config import parse

    monkeypatch.chdir(ROOT)
    cls = config_class(trainer)
    for example in cls.examples:
        words = shlex.split(example)
        assert words[:3] == ["diffalign", "train", trainer]
        refuse_unread(parse(cls, [word for word in words[3:] if word != "--dry_run"]))


# JSON Schema --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", trainer_names())
def test_the_committed_schema_is_up_to_date(trainer, capsys):
    text = (ROOT / f"configs/schema/{trainer}.json").read_text(encoding="utf-8")
    assert text == schema_text(config_class(trainer)), f"run: diffalign schema {trainer} > configs/schema/..."
    assert main(["schema", trainer]) == 0
    assert capsys.readouterr().out == text


def test_a_schema_of_no_trainer_names_those_there_are(capsys):
    assert main(["schema", "flow"]) == 2
    assert "diffusion_dpo, flow_grpo, forward_rl, refl, reward, not 'flow'" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", algorithm_names())
def test_a_schema_says_what_the_fields_say(trainer):
    cls = config_class(trainer)
    properties = json_schema(cls)["properties"]
    assert "allow_reward_code" not in properties, "a file may not set it"
    assert set(properties) == {field.name for field, _ in init_fields(cls)} - {"allow_reward_code"}
    assert properties["num_groups"]["minimum"] == 1
    assert properties["mixed_precision"]["enum"] == ["no", "bf16", "fp16"]
    assert properties["learning_rate"] == {"type": "number", "exclusiveMinimum": 0, "description": "peak learning rate",
                                           "default": 3e-4}  # fmt: skip
    assert all("description" in entry for entry in properties.values())
    json.dumps(properties, allow_nan=False)


SHIPPED = sorted(path for name in trainer_names() for path in (ROOT / "configs" / name).glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_file_names_its_schema_and_sets_nothing_that_is_unread(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    schema = path.parent / first.partition("$schema=")[2]
    assert schema.resolve() == ROOT / f"configs/schema/{path.parent.name}.json"
    refuse_unread(from_dict(config_class(path.parent.name), load_yaml(path), str(path)))


# Modes --------------------------------------------------------------------------------------------------------------

OFFLINE = {"model": "m", "train_data": ("a.parquet",)}
ONLINE = {"model": "m", "train_prompts": "p.txt", "rewards": {"shapes": 1.0}}
REFUSED = [
    *((OFFLINE, {name: value}) for name, value in {
        "num_groups": 16, "group_size": 1, "shared_start": False, "decode_precision": "no", "updates_per_rollout": 1,
        "max_unscored": 0.2, "overlap_rewards": True, "save_rollouts": False, "plan": {"preset": "ode"},
        "auto_beta_range": (1.0, 10.0), "time_mean": 0.0,
    }.items()),
    *((ONLINE, {name: value}) for name, value in {
        "num_pairs": 64, "streaming": False, "random_crop": False, "random_flip": False, "data": {"ties": "drop"},
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "changes"), REFUSED, ids=lambda value: "_".join(value))
@pytest.mark.parametrize("route", ["python", "replace", "file"])
def test_diffusion_dpo_refuses_what_its_mode_does_not_read_even_at_the_default(mode, changes, route):
    cls = config_class("diffusion_dpo")
    (name,) = changes
    if route == "python":
        config = cls(**mode, **changes)
    elif route == "replace":
        config = dataclasses.replace(cls(**mode, **changes), seed=3)
    else:
        plain = {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in (mode | changes).items()}
        config = from_dict(cls, plain, "run.yaml")
    with pytest.raises(ValueError, match=rf"^{name}(\.\w+)?: read only (off|on|with).*; leave it out$"):
        config.validate()


@pytest.mark.parametrize("mode", [OFFLINE, ONLINE])
def test_a_written_configuration_is_accepted_again(mode):
    cls = config_class("diffusion_dpo")
    config = cls(**mode)
    config.validate()
    again = from_dict(cls, to_dict(config))
    again.validate()
    assert again == config
    assert ("num_groups" in to_dict(config)) == (mode is ONLINE)
    assert ("num_pairs" in to_dict(config)) == (mode is OFFLINE)


def test_a_section_that_is_replaced_in_part_is_not_given_as_a_whole():
    config = config_class("diffusion_dpo")(**OFFLINE)
    config = dataclasses.replace(config, plan=dataclasses.replace(config.plan, num_steps=20))
    assert "plan.preset" not in list(given_names(config))
    config.validate()


# Versions -----------------------------------------------------------------------------------------------------------


def test_fields_of_earlier_versions_are_answered_by_name():
    for table in (RENAMED, REMOVED):
        for owner, names in table.items():
            cls = next(cls for cls in EVERY if cls.__name__ == owner)
            for name in names:
                assert name not in {field.name for field, _ in init_fields(cls)}
                with pytest.raises(ValueError, match=rf"^old.yaml: {name}: ") as caught:
                    from_dict(cls, {name: 1}, "old.yaml")
                assert "known keys" not in str(caught.value)


@pytest.mark.parametrize("trainer", algorithm_names())
def test_fields_that_decide_the_weights_may_not_change_on_resume(trainer):
    free = free_fields(config_class(trainer))
    assert {"output_dir", "eval_steps", "resume_from_checkpoint", "train_batch_size", "rollout_batch_size"} <= free
    assert not free & {"seed", "learning_rate", "model", "lora", "rewards", "num_groups", "loss", "data"}


def test_configurations_need_no_torch():
    import subprocess

    code = "import sys; from diffalign.cli import main; main(['train', 'refl', '--help']); main(['schema', 'refl']);"
    code += "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
