"""Configurations of forward-process RL: presets, what they do not read, files, dry runs."""

import dataclasses

import pytest

from diffalign import ForwardRLConfig
from diffalign.cli import main
from diffalign.config import parse
from diffalign.config.json_schema import schema_text
from diffalign.diffusion.plan import PlanConfig
from diffalign.trainers.forward_rl.config import ForwardRLConfig as Config
from diffalign.trainers.forward_rl.lag import LAGS, LagConfig
from diffalign.trainers.forward_rl.presets import PRESETS, Method
from tests.conftest import PIPELINE, PROMPTS, ROOT
from tests.trainers.made_forward_rl import config

FILES = sorted((ROOT / "configs/forward_rl").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_set(preset, tmp_path):
    method = Config(preset=preset).method
    for field in dataclasses.fields(Method):
        value = getattr(PRESETS[preset], field.name)
        assert getattr(method, field.name) == (LAGS[value] if field.name.endswith("_lag") else value)
    config(tmp_path, preset).validate()


def test_explicit_fields_win():
    args = Config(preset="dgpo", num_times=3, objective_options={"beta": 10.0}, reference_weight=0.0)
    method = args.method
    assert (method.num_times, method.reference_weight) == (3, 0.0)
    assert method.objective_options == {"beta": 10.0, "clip_range": 0.01}
    other = Config(preset="dgpo", objective="epg").method
    assert other.objective_options == {}  # those of dgpo are another objective's
    assert Config(preset="nft", old_lag=LagConfig(slope=0.01)).method.old_lag.decay(20) == pytest.approx(0.2)


UNREAD = {
    "estimator": ("nft", "adaptive"),
    "old_lag": ("dgpo", LagConfig("type1")),
    "time_fraction": ("crd", 0.5),
    "time_min": ("nft", 0.1),
    "time_shift": ("nft", 2.0),
    "time_mean": ("crd", 0.1),
    "time_std": ("nft", 0.5),
    "ema_lag": ("nft", LagConfig("linear")),
    "reference_guidance": ("ram", 4.5),
    "reference_weight_min": ("ram", 0.1),
    "trust_region": ("dgpo", "kl"),
    "filter_zero_advantage": ("nft", False),
    "advantage_epsilon": ("pepg", 0.1),
    "advantage_rule": ("nft", "leaf"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_field_that_the_method_does_not_read_is_refused(name, tmp_path):
    preset, value = UNREAD[name]
    extra = {"objective_options": {"clip_range": float("inf")}} if name == "old_lag" else {}
    with pytest.raises(ValueError, match=name):
        config(tmp_path, preset, **{name: value}, **extra).validate()


MISTAKES = {
    "unknown preset 'nftt'; use one of nft, awm": {"preset": "nftt"},
    "unknown beta2; this objective has beta": {"objective_options": {"beta2": 1.0}},
    "unknown forward objective 'nfd'": {"objective": "nfd"},
    "unknown lag 'type9'": {"old_lag": LagConfig("type9")},
    "set shared_start: false": {"shared_start": True},
    "give 1 to 4, or raise time_fraction": {"num_times": 9},
    "has 1 of plan.num_steps 4 steps": {"times": "stratified", "num_times": 3, "time_fraction": 0.5},
    "give at least 1": {"times": "uniform", "num_times": 0},
    "is above reference_weight 0.0001": {"reference_weight_min": 0.1},
    "needs a finite advantage_clip": {"reference_weight_min": 0.0, "advantage_clip": float("inf")},
    "beta and advantage_max must be positive": {"objective_options": {"beta": 0.0}},
    "anchors nothing": {"ema_weight": 0.1, "ema_lag": LagConfig("current")},
    "plan.branch": {"plan": PlanConfig("flow_grpo", num_steps=4, branch=(2,))},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_cannot_train_is_refused(message, tmp_path):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        config(tmp_path, **MISTAKES[message]).validate()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_valid(path):
    args = parse(Config, ["--config", str(path)])
    args.validate()
    assert args.model


def test_there_is_a_file_for_each_family():
    assert {path.stem for path in FILES} >= {"shapes", "shapes_long", "sd35_medium", "flux1_dev", "sdxl", "sd15"}


def test_the_committed_schema_is_up_to_date():
    text = (ROOT / "configs/schema/forward_rl.json").read_text(encoding="utf-8")
    assert text == schema_text(ForwardRLConfig), "run: diffalign schema forward_rl > configs/schema/forward_rl.json"


@pytest.mark.parametrize("preset", [pytest.param("nft", marks=pytest.mark.slow), "dgpo"])
def test_a_dry_run_prints_passes_per_image(preset, tmp_path, capsys):
    argv = ["--model", str(PIPELINE), "--max_sequence_length", "16", "--output_dir", str(tmp_path), "--preset", preset]
    argv += ["--train_prompts", str(PROMPTS / "shapes_train.jsonl"), "--rewards", "shapes", "--plan.preset", "ode"]
    argv += ["--plan.num_steps", "10", "--num_groups", "2", "--group_size", "2", "--max_train_steps", "2"]
    assert main(["train", "forward_rl", *argv, "--dry_run"]) == 0
    text = capsys.readouterr().out
    times = {"nft": "9 x (1 training + 2 comparing)", "dgpo": "4 x (1 training + 2 comparing)"}[preset]
    assert f"per image: {times} evaluations" in text
