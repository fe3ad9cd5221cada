"""Every option of every command means what its text says, whatever its type."""

import dataclasses
import typing
from pathlib import Path

import pytest

from diffalign.cli import main, take_switch
from diffalign.config import schema
from diffalign.config.schema import Place, arms_of
from diffalign.config.text import read
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.preflight import CHECKS
from tests.config_classes import CLASSES, options, samples

OPTIONS = options()

OUTPUTS = ("output_dir", "cache_dir", "calibrations")  # written, so that nothing need be there


def given(cls, argv, path, monkeypatch):
    """The value of an option as the class receives it, without checks of ranges and across fields."""
    from diffalign.config import parse

    for owner in owners(cls):
        monkeypatch.setattr(owner, "__post_init__", lambda self, *given: None, raising=False)
        monkeypatch.setattr(owner, "numbers_checked", False, raising=False)
    value = parse(cls, argv)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def owners(cls):
    yield cls
    for hint in typing.get_type_hints(cls).values():
        yield from (own for arm in arms_of(hint) if dataclasses.is_dataclass(arm) for own in owners(arm))


@pytest.mark.parametrize(("command", "cls", "path", "hint", "bare"), OPTIONS, ids=[f"{o[0]}-{o[2]}" for o in OPTIONS])
def test_each_option_reads_each_spelling_of_its_type(command, cls, path, hint, bare, monkeypatch):
    spelt = samples(hint, bare)
    assert spelt or path.endswith("words"), f"{path}: no spelling is known for {hint}"
    for text, value in spelt:
        expected = next((v for t, v in samples(hint, bare) if t == text), value)
        for argv in ([f"--{path}", text], [f"--{path}={text}"]):
            found = given(cls, argv, path, monkeypatch)
            assert repr(found) == repr(expected), argv


@pytest.mark.parametrize("hint", [tuple[str, ...], list[str], tuple[Path, ...], tuple[str, ...] | None])
def test_a_path_with_a_comma_is_one_path_where_it_exists(hint, tmp_path):
    file = tmp_path / "a,b.parquet"
    file.touch()
    place = Place("command line", PlanConfig, "x")
    assert [str(item) for item in read(hint, str(file), place)] == [str(file)]
    assert len(read(hint, f"{file}.gone", place)) == 2
    assert [str(item) for item in read(hint, f'"{file}.gone",c', place)] == [f"{file}.gone", "c"]


LISTS = [(c, cls, path) for c, cls, path, hint, _ in OPTIONS
         if any(typing.get_args(arm) == (str, ...) for arm in arms_of(hint)) and "words" not in path]  # fmt: skip


@pytest.mark.parametrize(("command", "cls", "path"), LISTS, ids=[f"{o[0]}-{o[2]}" for o in LISTS])
def test_a_list_may_be_given_twice_or_have_several_values(command, cls, path, monkeypatch):
    expected = ("a", "b", "c")
    for argv in (
        ["--" + path, "a", "--" + path, "b,c"],
        ["--" + path, "a", "b", "c"],
        [f"--{path}=a,b", f"--{path}=c"],
    ):
        found = given(cls, argv, path, monkeypatch)
        assert (tuple(found.split(",")) if isinstance(found, str) else found) == expected, argv


@pytest.mark.parametrize("yaml", ["rewards: [a, b]\n", "rewards: a, b\n", "rewards: {a: 1, b: 1}\n"])
@pytest.mark.parametrize("trainer", ["flow_grpo", "refl", "diffusion_dpo"])
def test_a_file_may_spell_lists_as_the_command_line_does(trainer, yaml, tmp_path):
    from diffalign.config import parse

    plan = "" if trainer == "refl" else "plan: cps_fast\n"
    (tmp_path / "run.yaml").write_text(f"{yaml}{plan}offload: vae\neval_rewards: a\nlora: 8\ncompile: yes\n")
    argv = ["--config", str(tmp_path / "run.yaml"), "--rewards.c", "2", *(["--plan.num_steps", "5"] if plan else [])]
    config = parse(CLASSES[f"train {trainer}"], argv)
    assert config.rewards == {"a": 1.0, "b": 1.0, "c": 2.0}
    assert (config.offload, config.eval_rewards, config.lora.rank, config.compile) == (("vae",), ("a",), 8, True)
    assert not plan or config.plan == PlanConfig("cps_fast", 5)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dry_run"], True),
        (["--dry_run", "--seed", "1"], True),
        *((["--dry_run", word], True) for word in ("true", "yes", "1", "on", "True")),
        *(([f"--dry_run={word}"], False) for word in ("false", "no", "0", "off", "FALSE")),
        (["--dry_run", "--dry_run=false"], False),
        ([], False),
    ],
)
def test_the_dry_run_is_a_switch_like_others(argv, expected):
    found, rest = take_switch(argv, "dry_run")
    assert found is expected
    assert rest == [token for token in argv if token in ("--seed", "1") and "--seed" in argv]


@pytest.mark.parametrize("command", CLASSES)
def test_all_that_is_wrong_is_listed_at_once(command, capsys):
    argv = [*command.split(), "--seed_x", "1", "--output_dr=2", "--config", "nowhere.yaml"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    for part in ("3 problems", "'seed_x'", "'output_dr'; did you mean 'output_dir'", "nowhere.yaml"):
        assert (part in error) or (part.endswith("'output_dir'") and "output_dr" in error), error
    assert len(error) < 2000


@pytest.mark.parametrize("command", CLASSES)
def test_a_message_is_bounded(command, capsys):
    assert main([*command.split(), f"--{'x' * 100_000}", "1", *(f"--bad_{i}=1" for i in range(200))]) == 2
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_a_path_is_checked_before_work_or_is_written_to(cls):
    """A new field of a configuration that names a file belongs in one of the two tables."""
    for owner in owners(cls):
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if Path in arms_of(hints[field.name]):
                assert field.name in CHECKS or field.name in OUTPUTS, field.name


@pytest.mark.parametrize(
    ("command", "field"), [("train flow_grpo", "eval_rewards"), ("train refl", "train_images"), ("eval", "models"),
                           ("train diffusion_dpo", "train_data"), ("score", "rewards"), ("relabel", "rewards")]
)  # fmt: skip
def test_python_may_pass_one_text_for_a_list(command, field):
    assert getattr(CLASSES[command](**{field: "a"}), field) == ("a",)
    assert getattr(CLASSES[command](**{field: ("a", "b,c")}), field) == ("a", "b,c")


def test_positional_arguments_may_follow_options():
    from diffalign.config import parse

    score = CLASSES["score"]
    assert parse(score, ["a", "--rewards", "x,y", "--batch_size", "2"], "images").images == ("a",)
    assert parse(score, ["--rewards", "x", "a", "b"], "images").images == ("a", "b")
    assert parse(score, ["--list", "a", "--prompt", "", "b"], "images").images == ("a", "b")
    assert parse(score, ["--prompt", ""], "images").prompt == ""
    assert parse(score, ["--prompt="], "images").prompt == ""
    assert parse(CLASSES["eval"], ["r", "--scales", "0.5", "1", "--rewards=a"], "models").scales == (0.5, 1.0)


def test_everything_of_a_long_list_is_not_shown():
    error = schema.ConfigError([f"problem {i} {'x' * 900}" for i in range(50)])
    assert len(str(error)) < 2000
    assert len(error.problems) == 50
