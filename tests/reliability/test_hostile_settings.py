"""Every number of every configuration, at values that no run should survive by accident."""

import json
import math
from pathlib import Path

import pytest
import torch

from diffalign.config import from_dict, parse, save_yaml, to_dict
from diffalign.runtime import checkpoint
from diffalign.runtime.errors import NotFinite
from diffalign.runtime.provenance import check_origin, origin
from tests.reliability.compare import same_run
from tests.reliability.hostile import NUMBERS, OTHERS, cases, from_python, made, with_value
from tests.reliability.null import run
from tests.reliability.trainers import TRAINERS, default, short

LONGEST = 2000  # characters of a message


def is_named(path: str, message: str) -> bool:
    """Whether a message names a field, or for a section's own check the section."""
    parts = path.split(".")
    # The losses, which know no configuration, name an option by its own name.
    return any(part in message for part in (path, parts[-1], parts[0], "brightness", "mu must", "auto_beta"))


def round_trip(args, folder: Path) -> None:
    """The value comes back from config.yaml, from a checkpoint and from the header of a LoRA."""
    folder.mkdir()
    save_yaml(args, folder / "config.yaml")
    again = parse(type(args), ["--config", str(folder / "config.yaml")])
    assert to_dict(again) == to_dict(args)
    found = origin(args, "data", 1, "cpu")
    state = {"origin": found}
    checkpoint.check_state(state)
    _, loaded = checkpoint.load(checkpoint.save(folder, 1, {}, state, keep=None))
    assert loaded == state
    assert not check_origin(loaded["origin"], origin(again, "data", 1, "cpu"), again)
    assert len(found["config_sha256"]) == 64


def attempt(name, folder, path, value):
    """The configuration, or why it is refused."""
    try:
        return made(name, folder, path, value), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("name", default("flow_grpo"))
def test_a_number_is_refused_by_name_or_comes_back_from_every_file(name, tmp_path, record_property):
    """Deterministic: it reads configurations and trains nothing."""
    refused = legal = 0
    for number, (path, label, value) in enumerate(cases(TRAINERS[name].config)):
        args, message = attempt(name, tmp_path / "run", path, value)
        if args is None:
            refused += 1
            # Rewards, whatever their weights, mean another mode; the trainer of that mode is a case of its own.
            other_mode = (name, path) == ("diffusion_dpo", "rewards") and "read only offline" in message
            assert is_named(path, message) or other_mode, (path, label, message)
            assert len(message) < LONGEST
            continue
        legal += 1
        assert "nan" not in json.dumps(to_dict(args), default=str).lower().split(": ")
        if label in ("inf", "-inf", "huge", "tiny"):  # of the others the text is plain
            round_trip(args, tmp_path / str(number))
    record_property("settings", refused + legal)
    record_property("settings_right", refused + legal)
    assert refused > 100
    assert legal > 50


@pytest.mark.parametrize("name", TRAINERS)
def test_nan_and_numbers_beyond_64_bits_are_refused_from_python_too(name, tmp_path):
    for path, label, value in cases(TRAINERS[name].config):
        if label in ("nan", "2**70") and path.split(".")[0] not in ("data",):
            if label == "2**70" and not isinstance(value, int):
                continue
            with pytest.raises(ValueError, match=r"must|lies|at least"):
                from_python(name, tmp_path, path, value)


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_refuse_nan_and_infinity_by_name(name):
    config = OTHERS[name]
    for path, label, value in cases(config):
        if label in ("nan", "2**70") and not (label == "2**70" and not isinstance(value, int)):
            with pytest.raises(ValueError, match=path.rpartition(".")[2]) as caught:
                from_dict(config, with_value({}, path, value), "hostile.yaml")
            assert len(str(caught.value)) < LONGEST


LEGAL = {
    "max_grad_norm": [math.inf, 1e30],
    "max_grad_spike": [0.0, math.inf],
    "hang_timeout": [0.0, 1.0, 1e38, math.inf],
    "checkpoints_total_limit": [2**62],
    "eval_steps": [2**62],
    "checkpointing_steps": [2**62],
    "seed": [-(2**63), 2**63 - 1],
    "adam_beta1": [0.0],
    "adam_weight_decay": [0.0],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in LEGAL.items() for v in values])
def test_a_legal_setting_trains_saves_and_is_left_alone_when_it_is_started_again(tmp_path, field, value, capsys):
    run(tmp_path / "run", **{field: value})
    assert checkpoint.load(checkpoint.latest(tmp_path / "run"))[1]["step"] == 8
    run(tmp_path / "run", **{field: value})
    assert "nothing to do" in capsys.readouterr().out


def test_an_infinite_norm_stops_and_goes_on_bit_for_bit(tmp_path):
    run(tmp_path / "straight", max_grad_norm=math.inf)

    def crash(phase, task):
        if phase == "backward" and task.loop.progress.step == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "broken", crash, max_grad_norm=math.inf)
    run(tmp_path / "broken", max_grad_norm=math.inf)
    same_run(tmp_path / "straight", tmp_path / "broken")


# What is legal and wild: the run ends by a message that names the setting, not by a traceback and not by the rewards.
WILD = [
    ("flow_grpo", {"learning_rate": 1e18}, NotFinite, r"not finite after 1 updates.*lower learning_rate.*1e\+18"),
    ("flow_grpo", {"guidance_scale": 1e21}, Exception, r"guidance_scale: 1e\+21|guidance_scale"),
    ("online_dpo", {"learning_rate": 1e18}, NotFinite, r"lower learning_rate.*learning_rate: 1e\+18"),
    ("refl", {"learning_rate": 1e18}, NotFinite, r"not finite after 1 updates.*lower learning_rate"),
    ("refl", {"learning_rate": 1e-300}, Exception, r"changed nothing.*learning_rate: 1e-300"),
    ("diffusion_dpo", {"beta": 1e21}, NotFinite, r"unusual settings, to be changed first: beta: 1e\+21"),
    ("flow_grpo", {"lr_warmup_steps": 10**18}, Exception, r"changed nothing.*lr_warmup_steps: 1e\+18"),
]


@pytest.mark.parametrize(("name", "changes", "kind", "message"), WILD)
@pytest.mark.filterwarnings("ignore")
def test_a_wild_run_ends_by_its_cause(name, changes, kind, message, tmp_path):
    args = short(name, tmp_path / "run", **changes)
    with pytest.raises(kind, match=message) as caught:
        TRAINERS[name].make(args).train()
    assert len(str(caught.value)) < LONGEST


def test_weights_that_are_not_finite_are_named_whatever_fails_on_them(tmp_path):
    def hook(phase, task):
        if phase == "sample" and task.loop.progress.step == 4:
            with torch.no_grad():
                task.loop.state.parameters[0].fill_(math.nan)
            raise ValueError("rewards failed on 100% of the images")

    with pytest.raises(NotFinite, match=r"weights are not finite after step 4: lower learning_rate.*rewards failed"):
        run(tmp_path, hook)
    assert checkpoint.latest(tmp_path).name == "checkpoint-4"


def test_the_sweep_covers_every_kind_of_number():
    assert {"nan", "inf", "-inf", "0", "negative", "huge", "2**70"} <= set(NUMBERS)
