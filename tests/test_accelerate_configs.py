"""The launch configurations mean what they say to accelerate, and to the trainers."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from diffalign.runtime.processes import connect, wants_shards
from tests.conftest import ROOT

FOLDER = ROOT / "configs/accelerate"


# Name -> accelerate's word for it, machines, processes over all of them.
CONFIGS = {
    "cpu": ("NO", 1, 1),
    "one_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 1, 8),
    "nodes": ("MULTI_GPU", 2, 16),
    "fsdp2": ("FSDP", 1, 8),
    "zero2": ("FSDP", 1, 8),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_starts_the_processes_that_its_comment_names(path):
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_machines, config.num_processes) == CONFIGS[path.stem]
    assert config.mixed_precision == "no", "the trainer's own option decides"


@pytest.fixture
def sharded(monkeypatch):
    """The environment that the launcher makes of a configuration with FSDP."""

    def launch(name: str, **changes: str) -> None:
        config = load_config_from_file(str(FOLDER / f"{name}.yaml")).fsdp_config
        settings = {key.upper(): str(value).lower() for key, value in config.items()}
        settings |= {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"} | changes
        for key, value in settings.items():
            monkeypatch.setenv(key, value)

    return launch


@pytest.mark.parametrize(("name", "keep"), [("fsdp2", False), ("zero2", True)])
def test_both_ways_to_shard_are_understood(sharded, name, keep):
    sharded(name)
    connect()
    shards = wants_shards(torch.device("cpu"))
    assert shards is not None
    assert (shards.device.type, shards.keep) == ("cpu", keep)


def test_one_process_has_nothing_to_share(sharded):
    sharded("fsdp2", WORLD_SIZE="1")
    assert wants_shards(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")],
)
def test_accelerate_options_that_would_be_ignored_are_refused(sharded, name, value):
    sharded("fsdp2", **{name: value})
    with pytest.raises(ValueError, match=f"the launcher sets {name}={value}: .*set fsdp_"):
        connect()


@pytest.mark.parametrize(("name", "value"), [("compile", True), ("mixed_precision", "fp16"), ("quantise", "4bit")])
def test_options_untested_with_sharding_are_refused(small, name, value):
    small().validate_shards()
    with pytest.raises(ValueError, match=f"{name} {value} does not go with FSDP2: set {name}: .*, or launch with ddp"):
        small(**{name: value}).validate_shards()


def test_deepspeed_is_refused_with_an_equivalent(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported.*fsdp2\.yaml"):
        connect()
