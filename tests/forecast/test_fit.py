"""``memory`` and ``diffalign fit``: what is chosen, in which order, and what is kept."""

import re

import pytest

from diffalign.cli import main
from diffalign.config import from_dict, parse
from diffalign.forecast import fit as module
from diffalign.forecast.rehearsal import Rehearsed
from diffalign.trainers.inputs import Inputs
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT

GIGA = 10**9
ARGV = [
    "--model",
    "stabilityai/stable-diffusion-3.5-medium",
    "--train_prompts",
    "prompts.txt",
    "--rewards",
    "pickscore",
]


def rehearse(entry, config, world=1, spread=None, *, cpu=False):
    """A model of 8 GB, text encoders of 10, and 1 GB an image, a tenth of it with checkpointing."""
    weights = {"no": 8.0, "8bit": 4.0, "4bit": 2.0}[config.quantise] / (2 if config.base_precision == "bf16" else 1)
    text = 0 if "text_encoders" in config.offload else 10.0
    image = 0.1 if config.gradient_checkpointing else 1.0
    peak = weights + text + max(image * config.train_batch_size, 0.2 * config.rollout_batch_size)
    return Rehearsed({("train", "backward"): int(peak * GIGA)}, {}, {}, {}, 1, 100)


@pytest.fixture
def fitted(monkeypatch):
    monkeypatch.setattr(module, "rehearse", rehearse)
    entry = find_algorithm("flow_grpo")

    def fit(memory, *more):
        return module.fit_memory(entry, parse(entry.config, [*ARGV, "--memory", memory, *more]))

    return fit


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("200GB", {"gradient_checkpointing": False, "offload": (), "base_precision": "no", "train_batch_size": 64}),
        ("40GB", {"gradient_checkpointing": False, "offload": (), "base_precision": "no", "train_batch_size": 16}),
        ("22GB", {"gradient_checkpointing": True, "offload": (), "base_precision": "no", "train_batch_size": 16}),
        ("12GB", {"gradient_checkpointing": True, "offload": ("text_encoders",), "base_precision": "no"}),
        ("6GB", {"gradient_checkpointing": True, "base_precision": "bf16", "quantise": "no"}),
        ("3GB", {"base_precision": "bf16", "quantise": "4bit"}),
    ],
)
def test_savings_are_taken_in_the_order_of_what_they_cost(fitted, memory, expected):
    config, line = fitted(memory)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.memory is None  # a resumed run has the same settings
    peak = float(re.search(r"rehearsed peak ([\d.]+) GB", line)[1])
    assert peak <= float(memory.removesuffix("GB")) * (1 - module.SPARE) + 0.05
    assert f"train_batch_size: {config.train_batch_size}" in line


def test_what_is_set_is_kept(fitted):
    config, line = fitted(
        "17GB", "--train_batch_size", "3", "--offload", "[]", "--quantise", "no", "--base_precision", "bf16"
    )
    assert (config.train_batch_size, config.offload, config.quantise, config.base_precision) == (3, (), "no", "bf16")
    assert "quantise" not in line
    with pytest.raises(ValueError, match="memory 10GB: no settings fit"):
        fitted("10GB", "--offload", "[]")


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flow_grpo", {"num_groups": 64, "group_size": 4, "updates_per_rollout": 2}),
        ("flow_grpo", {"num_groups": 64, "group_size": 4, "updates_per_rollout": 2, "plan": {"branch": [2, 2]}}),
        ("refl", {"num_groups": 64, "group_size": 4}),
        ("diffusion_dpo", {"num_pairs": 64, "train_data": ["pairs.parquet"]}),
    ],
)
def test_a_short_iteration_gives_every_process_two_passes(name, settings, world):
    entry = find_algorithm(name)
    config = from_dict(entry.config, {**settings, "train_batch_size": 2, "rollout_batch_size": 2})
    short = module.brief(config, world)
    entry.algorithm.check_processes(Inputs(short), world)
    count = short.num_pairs if settings.get("num_pairs") else short.num_groups * short.group_size
    assert count // world // getattr(short, "updates_per_rollout", 1) >= 4
    assert short != config


def test_batches_that_the_run_refuses_are_not_chosen(fitted, monkeypatch):
    def whole_groups(entry, config, *args, **kwargs):
        if config.train_batch_size % 16:
            raise ValueError("needs whole groups")
        return rehearse(entry, config, *args, **kwargs)

    monkeypatch.setattr(module, "rehearse", whole_groups)
    assert fitted("40GB")[0].train_batch_size == 16

    def refuse(*args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr(module, "rehearse", refuse)
    with pytest.raises(ValueError, match="no such thing"):
        fitted("40GB")

    def unknown(*args, **kwargs):
        raise NotImplementedError("aten::custom")

    monkeypatch.setattr(module, "rehearse", unknown)
    with pytest.raises(ValueError, match=r"aten::custom.*leave out memory"):
        fitted("40GB")


def test_several_processes_need_a_size(fitted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="write memory: 24GB, of one card"):
        fitted("auto")


def test_fit_prints_a_line_per_size(monkeypatch, capsys):
    monkeypatch.setattr(module, "rehearse", rehearse)
    monkeypatch.chdir(ROOT)
    assert (
        main(
            [
                "fit",
                "flow_grpo",
                *ARGV,
                "--train_prompts",
                "assets/prompts/shapes_train.jsonl",
                "--quantise",
                "no",
                "--lora.rank",
                "4",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == list(module.SIZES)
    assert all("rehearsed peak" in line for line in lines)
    assert main(["fit"]) == 2
    assert "name a trainer" in capsys.readouterr().err


def test_a_trainer_in_python_refuses_memory_that_nobody_resolved(tmp_path):
    entry = find_algorithm("flow_grpo")
    config = parse(entry.config, [*ARGV, "--memory", "24GB", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="fit_memory"):
        entry.trainer(args=config)
