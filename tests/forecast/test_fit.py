"""``memory`` and ``diffalign fit``: what is chosen, in which order, and what is kept."""

import re

import pytest

from diffalign.cli import main
from diffalign.config import from_dict, load_yaml, parse
from diffalign.forecast import dry_run, fitter
from diffalign.forecast import fit as module
from diffalign.forecast.cards import find_card
from diffalign.forecast.dry_run import Place
from diffalign.forecast.rehearsal import Rehearsed
from diffalign.models.weight_memory import Spread
from diffalign.runtime import checkpoint
from diffalign.trainers.cost import Share
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
    held = weights + (0 if "text_encoders" in config.offload else 10.0)
    image = 0.1 if config.gradient_checkpointing else 1.0
    rollout = 0.2 * config.rollout_batch_size
    image *= config.train_times_per_forward
    peaks = {"weights": held, "sample": held + rollout, "train": held + image * config.train_batch_size}
    return Rehearsed({(phase, "other"): int(size * GIGA) for phase, size in peaks.items()}, {}, {}, {}, 1, 100)


@pytest.fixture
def fitted(monkeypatch):
    monkeypatch.setattr(fitter, "rehearse", rehearse)
    entry = find_algorithm("flow_grpo")

    def fit(memory, *more):
        return module.fit_memory(entry, parse(entry.config, [*ARGV, "--memory", memory, *more]))

    return fit


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("200GB", {"gradient_checkpointing": False, "offload": (), "base_precision": "no", "train_batch_size": 64}),
        ("40GB", {"gradient_checkpointing": False, "offload": (), "base_precision": "no", "train_batch_size": 16}),
        ("22GB", {"gradient_checkpointing": True, "offload": (), "base_precision": "no", "train_batch_size": 8}),
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
    short = fitter.brief(config, world)
    entry.algorithm.check_processes(Inputs(short), world)
    count = short.num_pairs if settings.get("num_pairs") else short.num_groups * short.group_size
    assert count // world // getattr(short, "updates_per_rollout", 1) >= 4
    assert short != config


def test_batches_that_the_run_refuses_are_not_chosen(fitted, monkeypatch):
    def whole_groups(entry, config, *args, **kwargs):
        if config.train_batch_size % 16:
            raise ValueError("needs whole groups")
        return rehearse(entry, config, *args, **kwargs)

    monkeypatch.setattr(fitter, "rehearse", whole_groups)
    assert fitted("40GB")[0].train_batch_size == 16

    def refuse(*args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr(fitter, "rehearse", refuse)
    with pytest.raises(ValueError, match="no such thing"):
        fitted("40GB")

    def unknown(*args, **kwargs):
        raise NotImplementedError("aten::custom")

    monkeypatch.setattr(fitter, "rehearse", unknown)
    with pytest.raises(ValueError, match=r"aten::custom.*leave out memory"):
        fitted("40GB")


def test_several_processes_need_a_size(fitted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="write memory: 24GB, of one card"):
        fitted("auto")


def test_fit_prints_a_line_per_size(monkeypatch, capsys):
    monkeypatch.setattr(fitter, "rehearse", rehearse)
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


# Which memory is meant -----------------------------------------------------------------------------------------------

BARE = Place(Share())


@pytest.fixture
def bare(monkeypatch):
    """A machine without a card, of 15 GB of main memory."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(module, "free_memory", lambda: (15 * GIGA, "main memory"))


def test_a_size_is_that_of_a_card(bare):
    found = module.find_budget("40GB", BARE, local=True, dry=True)
    assert (found.size, found.place.cpu) == (40 * GIGA, False)


def test_auto_is_the_card_that_a_forecast_names(bare):
    found = module.find_budget("auto", Place(Share(), card=find_card("4090")), local=False, dry=True)
    assert (found.size, found.text) == (24 * GIGA, "auto, GeForce RTX 4090")


def test_auto_of_a_forecast_without_a_card_is_an_assumption_that_it_states(bare):
    found = module.find_budget("auto", BARE, local=False, dry=True)
    assert (found.size, found.place.cpu, found.place.free[0]) == (24 * GIGA, False, 24 * GIGA)
    assert "a card of 24GB is assumed" in found.text


@pytest.mark.parametrize(("local", "dry"), [(True, True), (True, False), (False, False)])
def test_auto_of_a_run_without_a_card_is_main_memory(bare, local, dry):
    found = module.find_budget("auto", BARE, local=local, dry=dry)
    assert (found.size, found.place.cpu) == (15 * GIGA, True)


def test_auto_of_several_processes_is_the_smallest_card(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr(module, "total_memory", lambda kind: 80 * GIGA)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert module.find_budget("auto", Place(Share(3, 8)), local=False, dry=False).size == 80 * GIGA
    with pytest.raises(ValueError, match="write memory: 24GB, of one card"):
        module.find_budget("auto", Place(Share(3, 16)), local=False, dry=False)


@pytest.mark.parametrize(("more", "said"), [([], "a card of 24GB is assumed"), (["--card", "h100"], "H100")])
def test_a_preset_is_forecast_on_a_machine_without_a_card(bare, more, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    for part in (fitter, dry_run):
        monkeypatch.setattr(part, "rehearse", rehearse)
    path = str(ROOT / "configs/flow_grpo/sd35_medium.yaml")
    assert main(["train", "flow_grpo", "--config", path, "--dry_run", "--output_dir", str(tmp_path), *more]) == 0
    out, err = capsys.readouterr()
    assert said in err
    assert re.search(r"train_batch_size: (\d+).*rehearsed peak", err)
    assert "memory: null" in out


# What stays ----------------------------------------------------------------------------------------------------------


def test_batches_of_stored_densities_are_equal_and_divide_an_update(fitted):
    config, _ = fitted("40GB", "--num_groups", "6", "--group_size", "4", "--updates_per_rollout", "2")
    assert config.rollout_batch_size == config.train_batch_size == 12
    apart, _ = fitted("40GB", "--old_log_prob", "recompute")
    assert (apart.rollout_batch_size, apart.train_batch_size) == (64, 16)


def test_trained_times_are_batched_in_shards_only(fitted, monkeypatch):
    """Where densities of rollouts are replayed, batches stay equal; else as many times as fit."""
    entry = find_algorithm("flow_grpo")
    options = [*ARGV, "--num_groups", "4", "--group_size", "8", "--updates_per_rollout", "4", "--plan.num_steps", "9"]

    def times(world, *more):
        spread = Spread(world) if world > 1 else None
        config = parse(entry.config, [*options, *more])
        found = fitter.Fitter(entry, config, Place(Share(0, world), spread)).fit(200 * GIGA).config
        return found.train_batch_size, found.train_times_per_forward, found.rollout_batch_size

    assert times(1) == (8, 1, 8)
    assert times(4) == (2, 4, 8)
    assert times(4, "--old_log_prob", "recompute") == (2, 8, 8)
    assert times(4, "--train_times_per_forward", "1")[1] == 1


def began(folder, **settings):
    """A checkpoint of a run with these settings."""
    folder.mkdir()
    checkpoint.save(folder, 1, {}, {"origin": {"config": settings}}, keep=None)
    return ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize(("quantise", "memory"), [("4bit", "200GB"), ("no", "40GB"), ("8bit", "12GB")])
def test_a_resumed_run_keeps_what_changes_results(quantise, memory, fitted, tmp_path):
    options = began(tmp_path / "run", quantise=quantise, base_precision="bf16", train_batch_size=1, offload=[])
    config, line = fitted(memory, *options)
    assert (config.quantise, config.base_precision) == (quantise, "bf16")
    assert config.train_batch_size > 1
    assert f"as the run began: base_precision: bf16, quantise: {quantise}" in line


def test_a_resumed_run_that_does_not_fit_says_what_it_keeps(fitted, tmp_path):
    options = began(tmp_path / "run", quantise="no", base_precision="no")
    with pytest.raises(ValueError, match="this run began with base_precision: no, quantise: no, which it keeps"):
        fitted("6GB", *options)


def test_a_run_begun_by_memory_goes_on_with_other_memory(monkeypatch, tmp_path, capsys):
    """Precision as it began, other batches: the checkpoint is accepted."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fitter, "rehearse", rehearse)
    argv = ["train", "flow_grpo", "--model", "assets/shapes-sd3", "--rewards", "jpeg_compressibility"]
    argv += ["--train_prompts", "assets/prompts/shapes_train.jsonl", "--max_sequence_length", "16", "--lora.rank", "4"]
    argv += ["--num_groups", "4", "--group_size", "4", "--plan.preset", "first_steps", "--plan.num_steps", "2"]
    argv += ["--plan.window_size", "1", "--offload", "[]", "--quantise", "no", "--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--memory", "16.5GB", "--max_train_steps", "1"]) == 0
    first = load_yaml(tmp_path / "run/config.yaml")
    more = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    assert main([*argv, "--memory", "200GB", *more]) == 0
    second = load_yaml(tmp_path / "run/config.yaml")
    assert first["base_precision"] == second["base_precision"] == "bf16"
    assert first["train_batch_size"] < second["train_batch_size"]
    assert "as the run began: base_precision: bf16" in capsys.readouterr().err
