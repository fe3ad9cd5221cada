import math
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from diffalign.config import describe, from_dict, load_yaml, option, parse, save_yaml, to_dict, to_yaml, yaml_dialect
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig


@dataclass(frozen=True)
class Ema:
    decay: float = option(0.999, "how slowly the average moves")
    warmup: bool = option(True, "start fast")


@dataclass
class Config:
    output_dir: Path = option(help="the run folder")
    learning_rate: float = option(1e-4, "step size")
    max_train_steps: int = 100
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "dtype of the model")
    resume_from_checkpoint: str | None = None
    rewards: dict[str, float] = option({"pickscore": 1.0}, "weights by name")
    targets: list[str] = option(["to_q"], "modules")
    betas: tuple[float, float] = (0.9, 0.999)
    sizes: tuple[int, ...] = ()
    seed: int | Literal["random"] = 0
    name: str = "run"
    gradient_checkpointing: bool = False
    plan: PlanConfig = option(PlanConfig("cps", 7), "the rollout")
    ema: Ema | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = option({"hps": 1.0}, "weights by name", bare=1.0)

    def __post_init__(self):
        if self.max_train_steps < 1:
            raise ValueError("max_train_steps must be positive")


BASE = ["--output_dir", "out"]


def run(*argv):
    return parse(Config, [*BASE, *argv])


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--learning_rate=3", "learning_rate", 3.0),
        ("--learning_rate .5E+1", "learning_rate", 5.0),
        ("--learning_rate -.inf", "learning_rate", -math.inf),
        ("--max_train_steps 1_000", "max_train_steps", 1000),
        ("--mixed_precision no", "mixed_precision", "no"),
        ("--resume_from_checkpoint latest", "resume_from_checkpoint", "latest"),
        ("--resume_from_checkpoint null", "resume_from_checkpoint", None),
        ("--resume_from_checkpoint 20", "resume_from_checkpoint", "20"),
        ("--rewards {a: 1, b: 1e-2}", "rewards", {"a": 1.0, "b": 0.01}),
        ("--rewards.clip.large 2", "rewards", {"pickscore": 1.0, "clip.large": 2.0}),
        ("--resume_from_checkpoint ", "resume_from_checkpoint", ""),
        ("--ema=", "ema", None),
        ("--targets [to_k, to_v]", "targets", ["to_k", "to_v"]),
        ("--targets to_k", "targets", ["to_k"]),
        ("--targets to_k,to_v", "targets", ["to_k", "to_v"]),
        ("--targets to_k to_v", "targets", ["to_k to_v"]),
        ("--targets [1, no]", "targets", ["1", "no"]),
        ('--targets "a,b",c', "targets", ["a,b", "c"]),
        ('--targets ["a,b", null]', "targets", ["a,b", "null"]),
        ("--targets=", "targets", []),
        ("--betas 0,0.5", "betas", (0.0, 0.5)),
        ("--sizes 1", "sizes", (1,)),
        ("--sizes -1, 2", "sizes", (-1, 2)),
        ("--sizes 5_000,1e3", "sizes", (5000, 1000)),
        ("--max_train_steps 1e4", "max_train_steps", 10000),
        ("--learning_rate 5_000", "learning_rate", 5000.0),
        ("--learning_rate inf", "learning_rate", math.inf),
        ("--plan cps_fast", "plan", PlanConfig("cps_fast", 7)),
        ("--plan.window_range 0,4", "plan", PlanConfig("cps", 7, window_range=(0, 4))),
        ("--plan.window_range null", "plan", PlanConfig("cps", 7)),
        ("--weights a,b", "weights", {"a": 1.0, "b": 1.0}),
        ("--weights [a, b]", "weights", {"a": 1.0, "b": 1.0}),
        ("--weights=a=0.5,b", "weights", {"a": 0.5, "b": 1.0}),
        ("--weights {a: 2}", "weights", {"a": 2.0}),
        ("--weights a: 2", "weights", {"a": 2.0}),
        ("--weights a.py:f,m:g", "weights", {"a.py:f": 1.0, "m:g": 1.0}),
        ("--weights.a 2", "weights", {"hps": 1.0, "a": 2.0}),
        ("--weights=", "weights", {}),
        ("--betas [0, 0.5]", "betas", (0.0, 0.5)),
        ("--sizes [1, 2, 3]", "sizes", (1, 2, 3)),
        ("--seed random", "seed", "random"),
        ("--seed -3", "seed", -3),
        ("--name 010", "name", "010"),
        ("--name true", "name", "true"),
        ("--name=", "name", ""),
        ("--name=a # b: 'c'", "name", "a # b: 'c'"),
        ("--name [x", "name", "[x"),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--gradient_checkpointing false", "gradient_checkpointing", False),
        ("--gradient_checkpointing no", "gradient_checkpointing", False),
        ("--gradient_checkpointing 1", "gradient_checkpointing", True),
        ("--gradient_checkpointing=Yes", "gradient_checkpointing", True),
        ("--gradient_checkpointing=0", "gradient_checkpointing", False),
        ("--plan.num_steps 9", "plan", PlanConfig("cps", 9)),
        ("--plan.window_range [1, 4]", "plan", PlanConfig("cps", 7, window_range=(1, 4))),
        ("--ema.decay 0.5", "ema", Ema(0.5)),
        ("--ema {warmup: false}", "ema", Ema(warmup=False)),
        ("--extra {a: [1, no]}", "extra", {"a": [1, "no"]}),
    ],
)
def test_options(argv, name, expected):
    value = getattr(run(*([argv] if "=" in argv else argv.split(" ", 1))), name)
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_option_wins_over_earlier_ones_and_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-3\nplan:\n  num_steps: 5\nrewards: {hps: 1}\nema:\nmixed_precision: no\n")
    config = run("--config", str(file), "--plan.preset", "flow_grpo", "--rewards.clip", "2", "--ema.decay", "0",
                 "--seed", "1", "--seed=2")  # fmt: skip
    assert config.learning_rate == 1e-3
    assert config.plan == PlanConfig("flow_grpo", 5)
    assert config.rewards == {"hps": 1.0, "clip": 2.0}
    assert config.ema == Ema(0.0)
    assert config.mixed_precision == "no"
    assert config.seed == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--learning_rte 1", r"command line: unknown key 'learning_rte'; did you mean 'learning_rate'"),
        ("--num_steps 1", r"unknown key 'num_steps'; did you mean 'plan.num_steps'"),
        ("--plan.num_stps 1", r"unknown key 'plan.num_stps'; did you mean 'plan.num_steps'"),
        ("--output-dir x", r"did you mean 'output_dir'"),
        ("--zzz 1", r"unknown key 'zzz'; known keys: output_dir, learning_rate"),
        ("--learning_rate.x 1", r"unknown key 'learning_rate.x'"),
        ("--learning_rate fast", r"learning_rate: expected float, got 'fast'"),
        ("--learning_rate true", r"learning_rate: expected float, got 'true'"),
        ("--max_train_steps 1.5", r"max_train_steps: expected int, got '1.5'"),
        ("--max_train_steps true", r"max_train_steps: expected int, got 'true'"),
        ("--max_train_steps 010", r"max_train_steps: expected int"),
        ("--max_train_steps 1,2", r"max_train_steps: expected int, got '1,2'"),
        ("--max_train_steps ", r"max_train_steps: expected int, got ''"),
        ("--gradient_checkpointing 2", r"gradient_checkpointing: expected bool, got '2'"),
        ("--gradient_checkpointing maybe", r"gradient_checkpointing: expected bool, got 'maybe'"),
        ("--mixed_precision fp8", r"mixed_precision: expected no\|fp16\|bf16, got 'fp8'"),
        ("--seed 1.5", r"seed: expected int\|random, got '1.5'"),
        ("--betas [1]", r"betas: expected 2 values \(tuple\[float, float\]\), got 1: write --betas N,N"),
        ("--betas 1,2,3", r"betas: expected 2 values .*got 3"),
        ("--sizes a", r"sizes.0: expected int, got 'a'"),
        ("--targets {a: 1}", r"targets: expected list\[str\], got fields: write --targets A,B or"),
        ("--rewards pickscore", r"rewards: .*: write --rewards.NAME VALUE, or --rewards '\{NAME: VALUE\}'"),
        ("--weights a=b", r"weights.a: expected float, got 'b'"),
        ("--weights a,,b", r"weights: '' has no name: write --weights NAME,NAME or NAME=VALUE"),
        ("--ema 0.5", r"ema: expected .*: write --ema.decay VALUE, or --ema '\{decay: VALUE\}'"),
        ("--rewards.hps high", r"rewards.hps: expected float"),
        ("--rewards {hps: high}", r"rewards.hps: expected float"),
        ("--plan [3]", r"plan: expected PlanConfig, got a list: write --plan.preset VALUE"),
        ("--plan {num_stps: 3}", r"unknown key 'plan.num_stps'; did you mean 'plan.num_steps'"),
        ("--plan {num_steps: x}", r"plan.num_steps: expected int, got 'x'"),
        ("--max_train_steps 0", r"max_train_steps must be positive"),
        ("--learning_rate", r"--learning_rate needs a value"),
        ("learning_rate 1", r"expected --key value, got 'learning_rate'"),
        ("--config missing.yaml", r"cannot read the config file missing.yaml: No such file"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        run(*argv.split(" ", 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan:\n  num_stps: 3\n", r"run.yaml: unknown key 'plan.num_stps'; did you mean 'plan.num_steps'"),
        ("plan.num_steps: 3\n", r"run.yaml: unknown key 'plan.num_steps'; in a file a section stands on its own"),
        ("plan:\n  window_range: [1, x]\n", r"run.yaml: plan.window_range: expected tuple\[int, int\] or null"),
        ("ema: {decay: x}\n", r"run.yaml: ema.decay: expected float"),
        ("seed: 1\nseed: 2\n", r"run.yaml is not a YAML file: seed given twice"),
        ("- 1\n", r"run.yaml must hold 'key: value' lines, found list"),
        ("a: [1\n", r"run.yaml is not a YAML file"),
        ("output_dir: null\n", r"output_dir: expected Path, got None"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(Config, ["--config", str(tmp_path / "run.yaml")])


def test_one_config_file_at_most():
    with pytest.raises(ValueError, match="given 2 times"):
        run("--config", "a", "--config", "b")


def test_missing_fields_are_listed_and_sections_fill_themselves():
    @dataclass
    class Inner:
        a: int
        b: int = 1

    @dataclass
    class Outer:
        first: int
        second: str
        inner: Inner = field(default_factory=lambda: Inner(3))

    globals().update(Inner=Inner)
    with pytest.raises(ValueError, match=r"no value for first, second; give it in a --config file or as --first VALUE"):
        parse(Outer, [])
    assert from_dict(Outer, {"first": 1, "second": "x", "inner": {"b": 2}}).inner == Inner(3, 2)


def test_round_trip_is_exact(tmp_path):
    config = Config(
        Path("a b/c"), 0.1 + 0.2, 5, "no", "1e-4", {"a": 1e-300}, ["no", "12:30", "2024-01-01", ""], (1e22, 0.0),
        (3,), "random", "line\nbreak # 'ü", True, PlanConfig(window_range=(0, 2)), Ema(1e-5), {"k": [None, True, "~"]},
    )  # fmt: skip
    assert from_dict(Config, to_dict(config)) == config
    save_yaml(config, tmp_path / "config.yaml")
    again = parse(Config, ["--config", str(tmp_path / "config.yaml")])
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert type(again.betas) is tuple
    assert type(again.output_dir) is type(config.output_dir)


TRICKY = [
    "no",
    "on",
    "yes",
    "1e-4",
    "1E5",
    "010",
    "0x1f",
    "12:30",
    "1_0",
    "~",
    "",
    ".5",
    "5.",
    "-",
    ".inf",
    "2024-01-01",
    "<<",
    "=",
]


@pytest.mark.parametrize("text", TRICKY)
def test_text_that_looks_like_something_else_survives(text):
    assert yaml_dialect.load(yaml_dialect.dump({"k": [text]})) == {"k": [text]}


@pytest.mark.parametrize("number", [1e-4, 1e22, 1e-300, 0.1, -0.0, 5.0, math.inf, 10**20, -7])
def test_numbers_survive(number):
    again = yaml_dialect.load(yaml_dialect.dump([number]))[0]
    assert (again, type(again)) == (number, type(number))


def test_defaults_are_not_shared():
    first = run()
    first.rewards["x"] = 1.0
    assert run().rewards == {"pickscore": 1.0}


def test_empty_file_and_loader(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "a.yaml") == {}


def test_help_lists_every_option_with_default_and_text():
    text = describe(Config)
    for line in (
        "  --output_dir Path (required)\n      the run folder",
        "  --learning_rate float = 0.0001\n      step size",
        "--mixed_precision no|fp16|bf16 = 'no'",
        "--rewards dict[str, float] = {pickscore: 1.0}",
        "--plan.num_steps int = 7",
        "--plan.window_range tuple[int, int]|null = null",
        "--ema Ema|null = null",
        "  --ema.decay float = 0.999\n      how slowly",
        "--sizes tuple[int, ...] = []",
    ):
        assert line in text, line


@pytest.mark.parametrize("hint", [int | float, float | int, str | float | int, Path | int | None])
@pytest.mark.parametrize("value", [3, "3"])
def test_a_union_takes_the_member_that_needs_no_conversion(hint, value):
    holder = make_dataclass("Holder", [("amount", hint)])
    if value == "3" and hint in (int | float, float | int):
        assert from_dict(holder, {"amount": "1e-4"}).amount == 1e-4
        return
    expected = Path("3") if value == "3" and hint == Path | int | None else value
    assert repr(from_dict(holder, {"amount": value}).amount) == repr(expected)


@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("typed", [True, False])
def test_a_whole_number_beyond_all_floats_is_infinite(sign, typed):
    @dataclass
    class Holder:
        amount: float = 0.0

    text = f"{sign}1{'0' * 400}"
    found = parse(Holder, ["--amount", text]) if typed else from_dict(Holder, {"amount": int(text)})
    assert found.amount == float(f"{sign}inf")


def test_a_table_of_rewards_is_written_without_what_was_not_set():
    config = from_dict(
        FlowGRPOConfig, {"rewards": {"pickscore": {"weight": 0.5}, "mine": {"path": "runs/judge"}}}, "test"
    )
    written = to_dict(config)["rewards"]
    assert "path" not in written["pickscore"]
    assert "path" not in written["mine"]
    assert from_dict(FlowGRPOConfig, {"rewards": written}, "test").rewards == config.rewards
    older = {name: {**entry, "path": None} for name, entry in written.items()}
    assert from_dict(FlowGRPOConfig, {"rewards": older}, "test").rewards == config.rewards
