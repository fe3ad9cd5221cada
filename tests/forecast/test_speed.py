"""A dry run of the largest presets takes less than a minute of one core."""

import time

import pytest

from diffalign.config import parse
from diffalign.forecast.rehearsal import rehearse
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT

# What 24 GB take.
SAVED = {
    "rollout_batch_size": "1",
    "train_batch_size": "1",
    "gradient_checkpointing": "true",
    "offload": "[text_encoders]",
    "quantise": "4bit",
}
SETTINGS = {
    "refl/flux1_dev": SAVED | {"vae_checkpointing": "true", "decode_slice": "1"},
    "flow_grpo/flux1_dev": SAVED,
    "refl/sd35_medium": {},
    "diffusion_dpo/sdxl": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_largest_rehearsals_take_less_than_a_minute(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    entry = find_algorithm(name.split("/")[0])
    options = [word for key, value in SETTINGS[name].items() for word in (f"--{key}", value)]
    config = parse(entry.config, ["--config", str(ROOT / f"configs/{name}.yaml"), "--memory", "null", *options])
    started = time.process_time()
    assert rehearse(entry, config).peak > 0
    assert time.process_time() - started < 60
